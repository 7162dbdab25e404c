"""Do drawn lesions help where real ones are scarce? On in-silico patients: `make bench NAME=lesion_downstream SEED=0`.

A classifier reads a patch and tells suspicious masses (BI-RADS 4 and 5) from others. It has 50 training patients, and
is tested on the real masses of all test patients. This is done for three choices of the 50 patients.

- `real`: their patches.
- `synthetic`: the same patches with the holes filled by a LesionLDM, each asked for the mass and the category of
  another patch. This LesionLDM was trained on the same 50 patients; only its autoencoder, which reads no
  label, saw all training patients. `real_and_synthetic`: both.
- `shared_generator`, `real_and_shared_generator`: the same with the LesionLDM of `lesion_ldm`, which learnt from all
  training patients: what somebody with few patients gains from a network of somebody with many. It is no fair
  comparison with `real`.

All classifiers take the same number of steps. `auc` is the mean over the three trainings, with an interval from a
bootstrap over test patients, so it contains the variation of patients, not of trainings.
"""
import inspect
import sys
from pathlib import Path
import pandas as pd
import torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._bench import options, tag
from benchmarks._lesions import (
    TRAIN, ask_other, draw_part, fit, gather, loaders, samples, start, train_diffusion, trained
)
from benchmarks._trainings import load_tensors, run_jobs, save_tensors, weights_or_train
from mammo_nb.core.seeding import rng_for, seed_everything
from mammo_nb.learners.lesion_ldm import copy_loaders
from mammo_nb.learners.lesion_verifier import verifier_learner
from mammo_nb.metrics.bootstrap import bootstrap_ci, paired_difference
from mammo_nb.metrics.weighted import auc
from mammo_nb.models.lesion_verifier import LesionVerifier, verifier_targets
from mammo_nb.samples.lesion_synthesis import LesionSynthesisDataset

FEW = 50 # training patients
SEEDS = 3 # choices of them
EPOCHS = 40 # of the diffusion on few patients
COPIES = 1 # drawings of each hole
STEPS = 400 # of a classifier
SAMPLING = dict(steps=20, guidance=2., scheduler='dpmsolver') # see `sampling`
VARIANTS = dict( # name -> whether real patches are in it, and whose drawings
    real=(True, None), synthetic=(False, 'own'), real_and_synthetic=(True, 'own'),
    shared_generator=(False, 'shared'), real_and_shared_generator=(True, 'shared'))

class DrawnPatches(LesionSynthesisDataset):
    "Patches of which the last ones are drawn"
    caches = ('places', 'drawn')
    def __init__(self, base, drawn):
        self.__dict__.update(base.__dict__)
        self.drawn = drawn
        self.first = len(base)-len(drawn)

    def __getitem__(self, i):
        inputs, targets = super().__getitem__(i)
        if i >= self.first:
            targets['image'] = self.drawn[i-self.first]
        return inputs, targets

# Few patients

def few_rows(rows, seed):
    "The rows of few training patients, and of some for validation, on which nothing is chosen"
    parts = []
    for split, n in (('train', FEW), ('valid', 10)):
        own = rows[rows.split == split]
        chosen = rng_for(seed, 'few', split).permutation(own.patient_id.unique())[:n]
        parts.append(own[own.patient_id.isin(chosen)])
    return pd.concat(parts, ignore_index=True)

def asked_rows(few, seed):
    "What is asked for: each place several times, each time as another one"
    real = few[few.split == 'train']
    return pd.concat([ask_other(real, 10*seed+k) for k in range(COPIES)], ignore_index=True)

def draw_few(model, prepared, few, seed, path):
    "Drawings for the holes of few patients, once"
    if not path.exists():
        asked, _ = gather(samples(prepared, asked_rows(few, seed)))
        save_tensors(dict(drawn=draw_part(model, asked, list(range(len(asked['mask']))), SAMPLING)), path)

def make_drawings(model, prepared, rows, seed, folder):
    "Train on few patients, and draw with that network and with the shared one"
    few = few_rows(rows, seed)
    own = train_diffusion(model.autoencoder, prepared, few, seed, folder/f'diffusion_few_{seed}.pt', EPOCHS)
    draw_few(own, prepared, few, seed, folder/f'drawn_few_own_{seed}.pt')
    draw_few(model, prepared, few, seed, folder/f'drawn_few_shared_{seed}.pt')

# Classifiers

def classifier_loaders(prepared, few, seed, variant, folder):
    "Loaders of real patches, drawn ones, or both"
    has_real, source = VARIANTS[variant]
    parts, drawn = [few if has_real else few[few.split != 'train']], []
    if source:
        parts.append(asked_rows(few, seed))
        drawn = load_tensors(folder/f'drawn_few_{source}_{seed}.pt')['drawn']
    dls = loaders(prepared, pd.concat(parts, ignore_index=True), TRAIN['verifier']['bs'], seed, augment=True)
    return copy_loaders(dls, (DrawnPatches(dls.train_ds, drawn), dls.valid_ds))

def train_classifier(prepared, rows, seed, variant, folder):
    "One classifier, trained once"
    def train(model):
        dls = classifier_loaders(prepared, few_rows(rows, seed), seed, variant, folder)
        epochs = max(1, round(STEPS/len(dls.train)))
        learn = verifier_learner(dls, model=model, seed=seed, keep_best=False)
        return fit(learn, epochs, TRAIN['verifier']['lr'])
    seed_everything(seed)
    path = folder/f'classifier_{variant}_{seed}.pt'
    return weights_or_train(path, LesionVerifier(buckets='suspicious'), train)

def scores(model, dataset):
    "A row for each mass: whether it is suspicious, and the score"
    inputs, images = gather(dataset)
    with torch.no_grad():
        values = torch.cat([model(part)['birads'].softmax(1)[:, 1] for part in images.split(64)])
    label = verifier_targets(inputs, 'suspicious')['birads']
    rows = dataset.rows
    table = pd.DataFrame(dict(patient_id=rows.patient_id, image_id=rows.finding_id, label=label, value=values))
    return table[table.label >= 0].reset_index(drop=True)

# The run

def main(argv=None):
    a = options(__doc__, argv, patients=700, train_seed=0)
    settings = dict(few=FEW, epochs=EPOCHS, copies=COPIES, classifier_steps=STEPS, drawn_with=SAMPLING)
    bench = start('lesion_downstream', a, 'about 30 minutes on 2 cores, after lesion_ldm', **settings)
    if bench.finished('real_and_synthetic - real', 'auc'):
        return
    prepared, rows, folder, (model, _, _) = trained(a)
    functions = few_rows, asked_rows, draw_few, make_drawings, classifier_loaders, train_classifier
    folder = folder/f'few_{a.train_seed}_{tag(settings, [inspect.getsource(f) for f in functions])}'
    folder.mkdir(exist_ok=True)
    run_jobs([(make_drawings, model, prepared, rows, seed, folder) for seed in range(SEEDS)])
    keys = [(variant, seed) for variant in VARIANTS for seed in range(SEEDS)]
    models = run_jobs([(train_classifier, prepared, rows, seed, variant, folder) for variant, seed in keys])
    tested = samples(prepared, rows[(rows.split == 'test') & (rows.kinds != '')])
    tables = {variant: [] for variant in VARIANTS}
    for (variant, _), classifier in zip(keys, models):
        tables[variant].append(scores(classifier, tested))
    for variant, own in tables.items():
        bench.add_estimate(variant, 'auc', bootstrap_ci(own, auc))
    for variant in ('real_and_shared_generator', 'real_and_synthetic'):
        difference = paired_difference(tables[variant], tables['real'], auc)
        bench.add_estimate(f'{variant} - real', 'auc', difference)

if __name__ == '__main__':
    main()
