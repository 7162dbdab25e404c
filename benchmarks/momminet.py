"""What do the other view and the other breast add to mass detection? On in-silico exams: `make bench NAME=momminet SEED=0`.

The patients are `insilico-v1` with one exam. Masses lie in both views of a breast at one distance from the
nipple. Decoys look like masses in one image: summation shadows are in one view only, dense clumps are in both
breasts. Every image is a case, also those without a mass. Recall is measured on test patients at 0.5, 1 and 2
false positives an image; a mass is hit by a box with more than 0.2 of overlap (IoU).

- `blobs`: differences of Gaussians, non-maximum suppression, logistic regression: see `_blobs`
- `single`: IpsiDualNet without the other view
- `bi`: BiDualNet, the other breast aligned by contours and nipples
- `ipsi`: IpsiDualNet; `ipsi_concat` without relation blocks
- `ipsi_box_location`, `ipsi_image_centre`: the geometry of the relation blocks from box centres in the image, or
  from distances to the centre of the image. `ipsi_shuffled_nipples`: nipples of other images of the same view,
  in training and in test
- `tri`: the fusion network, trained on maps of patients that the networks that made them did not know

Networks of one training seed share their beginning: `single` is trained first, and every network continues from
it, `single` too, for the same number of steps. What a network has beyond `single` begins at random. Values are
means over the training seeds. Intervals are from a bootstrap over patients, so they contain the variation of
patients, not of trainings. `best_dual` is the better of `bi` and `ipsi` on the *test* patients at 0.5 false
positives, a choice that favours the rival.

Networks are small (HRNet of width 8) and images are 192 x 144: the published ones are of width 48 and 3000 x
1500. Recipe, patients and steps were chosen on data seed 1000, before any row of another seed was known.
"""
import sys
from functools import partial
from pathlib import Path
import numpy as np
import pandas as pd
import torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._bench import Bench, check_test_patients, options
from benchmarks._blobs import detect_blobs, fit_blobs
from benchmarks._trainings import (
    load_tensors, prepare_insilico, recipe_folder, run_jobs, save_tensors, tables_or_train
)
import mammo_nb.core.fastai_import
from fastai.callback.core import Callback, CancelValidException
from mammo_nb.core.files import atomic_path
from mammo_nb.core.seeding import seed_everything
from mammo_nb.insilico.config import InSilicoConfig, settings_name
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.momminet import find_geometry, momminet_dls, momminet_learner, momminet_samples
from mammo_nb.learners.momminet import shuffle_nipples
from mammo_nb.learners.momminet_stages import compute_maps, patient_folds
from mammo_nb.learners.systems import predict
from mammo_nb.metrics.boxes import detections_table
from mammo_nb.metrics.froc import evaluate_boxes, froc_difference
from mammo_nb.models.bidual import BiDualNet
from mammo_nb.models.fusion import IntegratedFusionNet
from mammo_nb.models.ipsidual import IpsiDualNet
from mammo_nb.samples.three_views import ThreeViewDataset, three_view_cases

SIZE = (192, 144)
HRNET = dict(width=8, stem=16, modules=(1, 1, 1), blocks=1, finest=4, sigma=6.)
BOXES = dict(
    channels=32, dim=64, heads=4, roi_size=5, anchor_scale=2.5, n_proposals=64, n_other=16,
    n_sampled=32)
TRAIN = dict(bs=16, first=4, more=3, fusion=2, lr=2e-3, lr_more=1e-3, lr_map=3e-3, folds=2)
DETECTORS = dict( # row -> what differs from `single`
    single=dict(ipsilateral=False), ipsi_concat=dict(relation=False), ipsi=dict(),
    ipsi_box_location=dict(geometry='box_location'),
    ipsi_image_centre=dict(geometry='image_centre'), ipsi_shuffled_nipples=dict())
NETWORKS = (*DETECTORS, 'bi', 'tri')
MODULES = ('mammo_nb.learners.momminet_stages', 'mammo_nb.preparation.cache')

# Data

def select_patients(patients, test_of, seed):
    "Training and validation patients among the first `patients`, test patients after them"
    cohort = insilico_cohort(max(patients, test_of), seed, exams=1)
    return cohort.select(lambda t: (t.split == 'test') == (t.patient_index >= patients))

def write_geometry(prepared, path):
    "Locate nipples and align breasts, and keep both"
    found = find_geometry(prepared, three_view_cases(prepared.cohort))
    flows = [dict(main=a, other=b, flow=flow.float().flatten().tolist())
             for (a, b), flow in found['flows'].items()]
    shape = next(iter(found['flows'].values())).shape
    table = pd.DataFrame(flows)
    table.attrs['shape'] = list(shape)
    for name, t in dict(nipples=found['nipples'], flows=table).items():
        with atomic_path(path/f'{name}.parquet') as part:
            t.to_parquet(part)

def read_geometry(prepared, base):
    "Nipples and flows of all images, made once"
    path = recipe_folder(base, 'geometry', SIZE, [write_geometry], MODULES)
    if not (path/'flows.parquet').exists():
        write_geometry(prepared, path)
    table = pd.read_parquet(path/'flows.parquet')
    shape = table.attrs['shape']
    flows = {}
    for row in table.itertuples():
        flows[row.main, row.other] = torch.tensor(row.flow).reshape(shape).half()
    return dict(nipples=pd.read_parquet(path/'nipples.parquet'), flows=flows, source='contour')

def with_shuffled(geometry, prepared):
    "The same flows, and the nipples of other images"
    nipples = shuffle_nipples(geometry['nipples'], prepared)
    return geometry | dict(nipples=nipples, source='shuffled')

# Training

class NoValidation(Callback):
    "Validation would cost a fifth of the time and decides nothing"
    def before_validate(self):
        raise CancelValidException

def new_detector(row):
    "A new IpsiDualNet of a row"
    return IpsiDualNet(**DETECTORS[row], **BOXES, **HRNET)

def continue_from(model, weights):
    "Give a model the weights of `single` where it has the same ones"
    own = model.state_dict()
    if isinstance(model, BiDualNet):
        prefix = 'pyramid.encoder.'
        weights = {'encoder.'+k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    for name, value in weights.items():
        if name not in own:
            continue
        if own[name].shape == value.shape:
            own[name] = value
        elif name == 'fc1.weight': # `ipsi_concat`: features of the other view come after its own
            own[name][:, :value.shape[1]] = value
    model.load_state_dict(own)
    return model

def fit(model, row, seed, prepared, geometry, rows, epochs, lr, maps=None):
    "Train a network on the training images among the rows"
    variant = row if row in DETECTORS else dict(bi='bi', tri='tri')[row]
    seed_everything(seed)
    dls = momminet_dls(
        prepared, rows=rows, geometry=geometry, maps=maps, bs=TRAIN['bs'], seed=seed, device='cpu',
        in_memory=True)
    learn = momminet_learner(
        dls, variant, model=model, seed=seed, keep_best=False, cbs=[NoValidation()])
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, lr)
    return learn.model.eval()

def kept(path, model, train):
    "A network as it was trained, once"
    if path.exists():
        model.load_state_dict(load_tensors(path), strict=False)
        return model.eval()
    model = train(model)
    save_tensors(model.state_dict(), path)
    return model

def first_network(seed, prepared, geometry, rows, path):
    "`single` after its first epochs"
    def train(model):
        return fit(model, 'single', seed, prepared, geometry, rows, TRAIN['first'], TRAIN['lr'])
    seed_everything(seed)
    return kept(path, new_detector('single'), train)

def next_network(row, first, seed, prepared, geometry, rows, path):
    "A network that continues from `first`"
    lr = TRAIN['lr_map'] if row == 'bi' else TRAIN['lr_more']
    seed_everything(seed)
    model = BiDualNet(**HRNET) if row == 'bi' else new_detector(row)
    model = continue_from(model, first.state_dict())
    train = partial(fit, row=row, seed=seed, prepared=prepared, geometry=geometry, rows=rows,
                    epochs=TRAIN['more'], lr=lr)
    return kept(path, model, train)

def dual_networks(seed, prepared, geometry, rows, folder, name):
    "`ipsi` and `bi` of some patients"
    first = first_network(seed, prepared, geometry, rows, folder/f'first{name}_{seed}.pt')
    return [next_network(row, first, seed, prepared, geometry, rows, folder/f'{row}{name}_{seed}.pt')
            for row in ('ipsi', 'bi')]

def maps_of(nets, prepared, geometry, rows):
    dataset = ThreeViewDataset(
        prepared, rows, nipples=geometry['nipples'], flows=geometry['flows'], in_memory=False)
    return compute_maps(*nets, dataset)

def fold_maps(k, number, seed, prepared, geometry, rows, folder):
    "Maps of the patients of a fold, by networks that do not know them"
    held_out = np.zeros(len(rows), bool)
    held_out[(rows.split == 'train').to_numpy()] = number == k
    nets = dual_networks(seed, prepared, geometry, rows[~held_out], folder, f'_fold{k}')
    return maps_of(nets, prepared, geometry, rows[held_out])

def fusion_network(seed, prepared, geometry, rows, folder):
    "`tri`"
    train = rows[rows.split == 'train']
    number = patient_folds(prepared, train, ('mass',), TRAIN['folds'], seed)
    maps = {}
    for k in range(TRAIN['folds']):
        maps |= fold_maps(k, number, seed, prepared, geometry, rows, folder)
    nets = dual_networks(seed, prepared, geometry, rows, folder, '')
    maps |= maps_of(nets, prepared, geometry, rows[rows.split == 'valid'])
    seed_everything(seed)
    model = IntegratedFusionNet(*nets, width=32)
    return fit(model, 'tri', seed, prepared, geometry, rows, TRAIN['fusion'], TRAIN['lr_map'], maps)

def predict_test(model, prepared, geometry, rows):
    "Boxes of the test images"
    own = rows[rows.split == 'test']
    dataset = momminet_samples(
        prepared, own, model, nipples=geometry['nipples'], flows=geometry['flows'])
    table = predict(model, prepared, dataset=dataset)
    return table[table.output == 'probability']

def train(row, seed, prepared, geometry, rows, folder):
    "Train a row and predict the test images"
    if row == 'ipsi_shuffled_nipples':
        geometry = with_shuffled(geometry, prepared)
    known = rows[rows.split != 'test']
    if row == 'tri':
        model = fusion_network(seed, prepared, geometry, known, folder)
    else:
        first = first_network(seed, prepared, geometry, known, folder/f'first_{seed}.pt')
        model = next_network(row, first, seed, prepared, geometry, known, folder/f'{row}_{seed}.pt')
    return [predict_test(model, prepared, geometry, rows)]

def trained(row, seed, base, prepared, rows, folder):
    "The boxes of one training, made once"
    def make():
        return train(row, seed, prepared, read_geometry(prepared, base), rows, folder)
    return tables_or_train(folder, f'{row}_{seed}', ('boxes',), make)[0]

def start(seed, base, prepared, rows, folder):
    "The beginning of all networks of a seed"
    known = rows[rows.split != 'test']
    first_network(seed, prepared, read_geometry(prepared, base), known, folder/f'first_{seed}.pt')

# The rival that costs nothing

def read_images(prepared, rows):
    "Images, masks, and true boxes in prepared pixels"
    findings = prepared.cohort.findings
    loaded = [prepared.load(i) for i in rows.image_id]
    boxes = []
    for image_id, p in zip(rows.image_id, loaded):
        own = findings[(findings.kind == 'mass') & (findings.image_id == image_id)]
        stored = own[['xmin', 'ymin', 'xmax', 'ymax']].to_numpy(float)
        boxes.append(np.asarray(p.boxes(stored)) if len(stored) else np.zeros((0, 4)))
    return loaded, boxes

def blobs(prepared, rows):
    "Boxes of the test images by the rival"
    loaded, boxes = read_images(prepared, rows[rows.split == 'train'])
    planes = [(p.image[0], p.mask[0] if p.mask.ndim == 3 else p.mask) for p in loaded]
    model = fit_blobs(*zip(*planes), boxes)
    own = rows[rows.split == 'test']
    found, scores = [], []
    for image_id in own.image_id:
        p = prepared.load(image_id)
        mask = p.mask[0] if p.mask.ndim == 3 else p.mask
        b, s = detect_blobs(model, p.image[0], mask)
        found.append(p.inverse_boxes(b) if len(b) else b)
        scores.append(s)
    return detections_table(own, found, scores, 'blobs', 'probability', '1')

# Rows

def add_recalls(bench, name, table):
    "Add the recalls of a table of `evaluate_boxes` or `froc_difference`"
    for row in table.itertuples():
        if row.metric.startswith('recall_'):
            bench.add(name, row.metric, row.value, row.low, row.high, row.n_groups)

def recall_at_half(tables, findings):
    table = evaluate_boxes(tables, findings, n_boot=10).set_index('metric')
    return table.value['recall_0.5']

def add_rows(bench, runs, findings):
    "Add all rows"
    for row, tables in runs.items():
        add_recalls(bench, row, evaluate_boxes(tables, findings))
    best = max(('bi', 'ipsi'), key=lambda row: recall_at_half(runs[row], findings))
    add_recalls(bench, f'best_dual: {best}', evaluate_boxes(runs[best], findings))
    pairs = (
        ('single', 'blobs'), ('tri', best), ('ipsi', 'ipsi_concat'), ('bi', 'single'),
        ('ipsi', 'single'), ('ipsi', 'ipsi_box_location'), ('ipsi', 'ipsi_image_centre'),
        ('ipsi', 'ipsi_shuffled_nipples'))
    for a, b in pairs:
        name = f'{a} - {"best_dual" if a == "tri" else b}'
        add_recalls(bench, name, froc_difference(runs[a], runs[b], findings))

def main(argv=None):
    a = options(__doc__, argv, patients=700, test_of=3000, train_seeds=[0, 1, 2])
    check_test_patients('momminet', a.patients, a.test_of)
    settings = settings_name(InSilicoConfig(seed=a.seed, exams=1))
    config = dict(cohort=settings, patients=a.patients, test_of=a.test_of, size=SIZE,
                  hrnet=HRNET, boxes=BOXES, train=TRAIN)
    n_seeds = len(a.train_seeds)
    cost = f'about an hour on 2 cores, most of it to train {len(NETWORKS)*n_seeds} networks'
    bench = Bench('momminet', a.seed, config, cost, train_seeds=a.train_seeds)
    if bench.finished('ipsi - ipsi_shuffled_nipples', 'recall_2'):
        return
    cohort = select_patients(a.patients, a.test_of, a.seed)
    prepared, base = prepare_insilico(cohort, f'{a.patients}_{a.test_of}', SIZE)
    rows = three_view_cases(prepared.cohort)
    read_geometry(prepared, base)
    functions = (fit, first_network, next_network, fold_maps, fusion_network, predict_test, train)
    recipe = (SIZE, HRNET, BOXES, TRAIN, DETECTORS)
    folder = recipe_folder(base, 'momminet', recipe, functions, MODULES)
    run_jobs([(start, seed, base, prepared, rows, folder) for seed in a.train_seeds])
    keys = [(row, seed) for seed in a.train_seeds for row in NETWORKS if row != 'tri']
    keys += [('tri', seed) for seed in a.train_seeds] # after its parts
    found = {}
    for part in (keys[:-n_seeds], keys[-n_seeds:]):
        jobs = [(trained, row, seed, base, prepared, rows, folder) for row, seed in part]
        found |= dict(zip(part, run_jobs(jobs)))
    runs = dict(blobs=[blobs(prepared, rows)])
    runs |= {row: [found[row, seed] for seed in a.train_seeds] for row in NETWORKS}
    test_ids = rows.image_id[rows.split == 'test']
    findings = prepared.cohort.findings
    own = findings[(findings.kind == 'mass') & findings.image_id.isin(test_ids)]
    add_rows(bench, runs, own)

if __name__ == '__main__':
    main()
