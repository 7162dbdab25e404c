"""Does the BI-RADS category help to tell malignant masses from benign ones? On in-silico masses: `make bench NAME=malignancy SEED=0`.

The patients are those of `insilico-v1` with one exam, about one benign mass in each breast, a cancer in most
patients, and no calcifications. Each annotated mass in each view is one patch: a square around its box, half
as wide again. A patch has the pathology and the category that the simulated radiologist gave; where one of
them is unknown, it counts in no term of the loss, and masses of unknown pathology are left out.

One small network with two heads is trained by one recipe, three times for each weighting:

- `multitask`: learned weights of both tasks. `binary`: malignancy alone. `fixed_0.1` to `fixed_0.9`: this
  weight for malignancy, the rest for the category.
- `auc` is that of the head for malignancy on test patients, averaged over the training seeds. Intervals
  are from a bootstrap over patients, so they contain the variation of patients, not of trainings. Rows
  `multitask - binary, training 0` and so on show each training seed.
- `best_fixed` is the fixed weight with the highest AUC on the *test* patients, a choice that favours the
  rival. `fixed_0.7` is the best one of the source.
- `multitask_birads`: the AUC of the other head, the predicted category.

What is there to see:

- `measurements`: a logistic regression on four numbers that need no network: size of the box, contrast of
  the mass to its surroundings, and the variation of both.
- `known_lesion`: a logistic regression on the true shape, size and contrast of the mass, which no image shows
  exactly. `radiologist`: the category itself, which was drawn from the truth with noise.

The BI-RADS category of an in-silico mass is noise around its pathology and, for malignant ones, its
contrast. It contains no opinion on margin or shape, so it teaches less here than a radiologist's would.

The recipe was chosen on the first 700 patients of data seed 0, with malignancy alone; those of training and
validation are among them. Test patients come after them, so no row is measured on a patient that was seen
before. On validation patients the AUC is between .859 and .864 with or without local contrast, with patches 1.5
or 2 times as wide as the box, with 8 or 12 epochs and rates of .003 or .01, and between .84 and .86 from the
second epoch on: the training is over. Patches of a fixed width in mm have .84.

Differences from the source, beside the size of patches and network: one cycle of a few epochs instead of
plateaus with early stopping; the weights of the last epoch; no weights of ImageNet; annotated masses
instead of detected ones in the test.
"""
import sys
from functools import partial
from pathlib import Path
import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._bench import Bench, check_test_patients, options
from benchmarks._trainings import prepare_insilico, recipe_folder, run_jobs, tables_or_train
from mammo_nb.core.seeding import seed_everything
from mammo_nb.insilico.config import InSilicoConfig, settings_name
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.malignancy import malignancy_learner
from mammo_nb.learners.systems import predict
from mammo_nb.losses.multitask import birads_target
from mammo_nb.metrics.bootstrap import bootstrap_ci, paired_difference
from mammo_nb.metrics.tables import select_output
from mammo_nb.metrics.weighted import auc
from mammo_nb.samples.augment import Augment
from mammo_nb.samples.lesion_patches import PatchDataset, annotated_patches, patch_dls

SIZE = (384, 288)
COHORT = dict(exams=1, benign=1., prevalence=.8, calcified=0.)
DEVELOPMENT = 700 # patients; those of the test come after them
PATCH = dict(size=32, context=1.5)
NET = dict(stride=8, width=16)
TRAIN = dict(bs=16, lr=.01, flip=.5)
FIXED = {f'fixed_{w/10:g}': w/10 for w in range(1, 10)}
ROWS = dict(multitask=('learned', .7), binary=('binary', .7)) | {
    name: ('fixed', weight) for name, weight in FIXED.items()}
PARTS = ('malignant', 'birads')
MODULES = ('mammo_nb.learners.malignancy', 'mammo_nb.preparation.cache')

# Data

def select_patients(patients, test_of, seed):
    "Training and validation patients among the first `patients`, test patients after `DEVELOPMENT`"
    cohort = insilico_cohort(test_of, seed, **COHORT)
    def wanted(t):
        learnt = (t.split != 'test') & (t.patient_index < patients)
        return learnt | (t.split == 'test') & (t.patient_index >= DEVELOPMENT)
    return cohort.select(wanted)

def name_masses(table):
    "The rows in which a mass is known, each image with the number of its mass"
    number = table.groupby('image_id', sort=False).cumcount()
    named = table.assign(image_id=table.image_id+' mass '+number.astype(str))
    named = named[['patient_id', 'image_id', 'label', 'value']]
    return named.dropna(subset='label').reset_index(drop=True)

# Training

def train(row, seed, prepared, epochs):
    "Train a row; the predictions of both heads for the test masses"
    seed_everything(seed)
    dls = patch_dls(
        prepared, bs=TRAIN['bs'], **PATCH, augment=Augment(flip=TRAIN['flip']), in_memory=True,
        seed=seed, device='cpu')
    learn = malignancy_learner(
        dls, *ROWS[row], encoder='small', model_args=NET, recipe=None, keep_best=False, seed=seed)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, TRAIN['lr'])
    table = predict(learn, prepared, split='test')
    return [name_masses(select_output(table, output)) for output in ('probability', 'birads')]

def trained(row, seed, prepared, epochs, folder):
    "The tables of one training, made once"
    return tables_or_train(folder, f'{row}_{seed}', PARTS, partial(train, row, seed, prepared, epochs))

# What needs no network

def masses(prepared, base):
    "All masses of known pathology with what is true of them"
    rows = annotated_patches(prepared.cohort)
    findings = prepared.cohort.findings[['finding_id', 'lesion_id', 'shape', 'diameter_mm']]
    known = pd.read_parquet(base/'files'/'truth.parquet')[['patient_id', 'lesion_id', 'contrast']]
    rows = rows.merge(findings, on='finding_id', validate='one_to_one')
    return rows.merge(known, on=['patient_id', 'lesion_id'], validate='many_to_one')

def measure(prepared, rows):
    "Size of the box, contrast to the surroundings, variation inside and outside, [N,4]"
    dataset = PatchDataset(prepared, rows, size=32, context=2., in_memory=False)
    distance = np.hypot(*(np.mgrid[:32, :32]-15.5)) # the box ends at 8
    inside, around = distance < 5, (distance > 9) & (distance < 14)
    found = []
    for i, row in enumerate(rows.itertuples()):
        patch = dataset[i][0]['patch'][0].numpy()
        side = max(row.xmax-row.xmin, row.ymax-row.ymin)
        outside = patch[around & (patch > 0)]
        contrast = patch[inside].mean()-outside.mean()
        found.append([np.log(side), contrast, patch[inside].std(), outside.std()])
    return np.array(found)

def know(rows):
    "True shape, size and contrast, [N,6]"
    shapes = pd.get_dummies(rows['shape'], dtype=float)
    sizes = np.log(rows[['diameter_mm', 'contrast']])
    return np.column_stack([shapes, sizes])

def regress(rows, numbers):
    "Predictions of a logistic regression for the test masses"
    learnt = ((rows.split == 'train') & rows.label.notna()).to_numpy()
    tested = (rows.split == 'test').to_numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(numbers[learnt], rows.label[learnt])
    return name_masses(rows[tested].assign(value=model.predict_proba(numbers[tested])[:, 1]))

def without_network(prepared, base):
    "Variant -> predictions for the test masses"
    rows = masses(prepared, base)
    read = rows[rows.split == 'test'].assign(value=lambda t: birads_target(t.birads))
    return dict(
        measurements=regress(rows, measure(prepared, rows)),
        known_lesion=regress(rows, know(rows)),
        radiologist=name_masses(read))

# Rows

def best_fixed(runs):
    "The fixed weight with the highest AUC on the test patients"
    return max(FIXED, key=lambda name: bootstrap_ci(runs[name], auc, n_boot=10).value)

def add_rows(bench, runs, others, seeds):
    "Add all rows; `runs`: row -> predictions of each training, `others`: -> predictions"
    for name, tables in (runs | others).items():
        bench.add_estimate(name, 'auc', bootstrap_ci(tables, auc))
    best = best_fixed(runs)
    bench.add_estimate(f'best_fixed: {best}', 'auc', bootstrap_ci(runs[best], auc))
    pairs = (
        ('binary', 'measurements', others['measurements']), ('multitask', 'fixed_0.7', runs['fixed_0.7']),
        ('best_fixed', 'binary', runs['binary']), ('multitask', 'binary', runs['binary']),
        ('multitask', 'best_fixed', runs[best]))
    runs = runs | dict(best_fixed=runs[best])
    for name, other, tables in pairs:
        bench.add_estimate(f'{name} - {other}', 'auc', paired_difference(runs[name], tables, auc))
    for i, seed in enumerate(seeds):
        difference = paired_difference(runs['multitask'][i], runs['binary'][i], auc)
        bench.add_estimate(f'multitask - binary, training {seed}', 'auc', difference)

# The run

def start(a):
    "Open the results of a run"
    config = dict(
        cohort=settings_name(InSilicoConfig(seed=a.seed, **COHORT)), patients=a.patients,
        test_of=a.test_of, size=SIZE, patch=PATCH, net=NET, train=TRAIN, epochs=a.epochs)
    n_models = len(ROWS)*len(a.train_seeds)
    minutes = round(.012*a.patients+n_models*a.epochs*a.patients/22000)
    cost = f'about {minutes} minutes on 2 cores, most of it to train {n_models} models'
    return Bench('malignancy', a.seed, config, cost, train_seeds=a.train_seeds)

def main(argv=None):
    a = options(__doc__, argv, patients=500, test_of=1900, epochs=8, train_seeds=[0, 1, 2])
    check_test_patients('malignancy', max(a.patients, DEVELOPMENT), a.test_of)
    bench = start(a)
    if bench.finished(f'multitask - binary, training {a.train_seeds[-1]}', 'auc'):
        return
    cohort = select_patients(a.patients, a.test_of, a.seed)
    prepared, base = prepare_insilico(cohort, f'{a.patients}_{a.test_of}', SIZE)
    recipe = (SIZE, PATCH, NET, TRAIN, ROWS, a.epochs)
    folder = recipe_folder(base, 'malignancy', recipe, [train, name_masses], MODULES)
    keys = [(row, seed) for seed in a.train_seeds for row in ROWS]
    found = run_jobs([(trained, row, seed, prepared, a.epochs, folder) for row, seed in keys])
    heads = dict(zip(keys, found))
    runs = {row: [heads[row, seed][0] for seed in a.train_seeds] for row in ROWS}
    birads = [heads['multitask', seed][1] for seed in a.train_seeds]
    others = dict(multitask_birads=birads) | without_network(prepared, base)
    add_rows(bench, runs, others, a.train_seeds)

if __name__ == '__main__':
    main()
