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
- `tri`: the fusion network, trained on maps of patients that the networks that made them did not know; every mass
  counts alike in its loss, and its map rates the boxes of both networks

Networks of one training seed share their beginning. A detector of single views is trained first. Every detector
starts from it, keeps its first stage (HRNet, pyramid, proposals), and trains its second stage for the same number
of steps, `single` too. So detectors differ in what they do with the same proposals. `bi` starts from its HRNet.
The networks of the two folds are made in the same way, in as many steps, from patients of the other fold.

Values are means over the training seeds. Intervals are from a bootstrap over patients, so they contain the
variation of patients, not of trainings. `best_dual` is the better of `bi` and `ipsi` on the *test* patients at 0.5
false positives, a choice that favours the rival.

Networks are small (HRNet of width 8) and images are 192 x 144: the published ones are of width 48 and 3000 x
1500. The recipe was chosen on validation patients, and on patients of the test split with an index below
`patients`, which are neither trained nor tested on here.
"""
import inspect
import sys
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from torch import nn
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._bench import Bench, check_test_patients, options, tag
from benchmarks._blobs import detect_blobs, fit_blobs
from benchmarks._trainings import (
    load_tensors, prepare_insilico, recipe_folder, run_jobs, save_tensors, tables_or_train
)
import mammo_nb.core.fastai_import
from fastai.callback import core as callbacks
from fastai.callback.training import GradientClip
from fastai.learner import Learner
from mammo_nb.core.files import atomic_path
from mammo_nb.core.seeding import seed_everything
from mammo_nb.insilico.config import InSilicoConfig, settings_name
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.detection import DetectionBatch, DetectionLoss
from mammo_nb.learners.momminet import find_geometry, momminet_dls, momminet_learner, momminet_samples
from mammo_nb.learners.momminet import shuffle_nipples
from mammo_nb.learners.momminet_stages import compute_maps, patient_folds
from mammo_nb.learners.systems import predict
from mammo_nb.metrics.boxes import detections_table
from mammo_nb.metrics.froc import evaluate_boxes, froc_difference
from mammo_nb.models.bidual import BiDualNet
from mammo_nb.models.fusion import IntegratedFusionNet
from mammo_nb.models.ipsidual import IpsiDualNet
from mammo_nb.models.proposals import target_list
from mammo_nb.samples.three_views import ThreeViewDataset, three_view_cases

SIZE = (192, 144)
HRNET = dict(width=8, stem=16, modules=(1, 1, 1), blocks=1, finest=4, sigma=6.)
BOXES = dict(
    channels=32, dim=64, heads=4, roi_size=5, anchor_scale=2.5, n_proposals=64, n_other=48,
    n_sampled=32)
TRAIN = dict(
    bs=16, first=5, second=7, bi=5, lr=2e-3, lr_second=1e-3, lr_bi=3e-3, clip=12., folds=2)
FUSION = dict(width=32, epochs=4, lr=3e-3, mass_pixels=115.) # a mass of mean size
DETECTORS = dict( # row -> what differs from `ipsi`
    single=dict(ipsilateral=False), ipsi_concat=dict(relation=False), ipsi=dict(),
    ipsi_box_location=dict(geometry='box_location'),
    ipsi_image_centre=dict(geometry='image_centre'), ipsi_shuffled_nipples=dict())
ROWS = ('blobs', *DETECTORS, 'bi', 'tri')
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

def two_views(rows):
    "The same cases without the other breast, which detectors do not read"
    return rows.assign(image_id_contralateral=None)

# Training

class NoValidation(callbacks.Callback):
    "Validation would cost a fifth of the time and decides nothing"
    def before_validate(self):
        raise callbacks.CancelValidException

class SecondStages(nn.Module):
    "Detectors with the same first stage, which is run once for all of them"
    def __init__(self, detectors):
        super().__init__()
        self.detectors = nn.ModuleDict(detectors)

    def forward(self, inputs, targets):
        "The losses of all second stages"
        nets = list(self.detectors.items())
        rows = target_list(targets, len(inputs['main']))
        first = next(net for _, net in nets if net.ipsilateral).propose(inputs)
        losses = {}
        for row, net in nets:
            own = net.second_losses(inputs, first, rows)
            losses |= {f'{row} {name}': value for name, value in own.items()}
        return losses

def make_loaders(seed, prepared, geometry, rows, maps=None):
    "Loaders of the training images among the rows"
    return momminet_dls(
        prepared, rows=rows, geometry=geometry, maps=maps, bs=TRAIN['bs'], seed=seed, device='cpu',
        in_memory=True)

def fit(learn, epochs, lr):
    "Train without a word"
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, lr)
    return learn.model.eval()

def fit_variant(model, variant, seed, dls, epochs, lr):
    "Train one network"
    learn = momminet_learner(
        dls, variant, model=model, seed=seed, keep_best=False, cbs=[NoValidation()])
    return fit(learn, epochs, lr)

def kept(path, model, train):
    "A network as it was trained, once"
    if not path.exists():
        save_tensors(train(model).state_dict(), path)
    model.load_state_dict(load_tensors(path))
    return model.eval()

def first_network(seed, prepared, geometry, rows, path, times=1):
    "The detector of single views from which all start; `times` as many epochs"
    def train(model):
        dls = make_loaders(seed, prepared, geometry | dict(flows=None), two_views(rows))
        return fit_variant(model, 'single', seed, dls, times*TRAIN['first'], TRAIN['lr'])
    seed_everything(seed)
    return kept(path, IpsiDualNet(**DETECTORS['single'], **BOXES, **HRNET), train)

def second_stages(names, seed, prepared, geometry, rows, first, path, times=1):
    "Detectors that start from `first`, by row"
    def train(model):
        dls = make_loaders(seed, prepared, geometry | dict(flows=None), two_views(rows))
        cbs = [DetectionBatch(), GradientClip(TRAIN['clip']), NoValidation()]
        learn = Learner(dls, model, DetectionLoss(), wd=.01, cbs=cbs)
        return fit(learn, times*TRAIN['second'], TRAIN['lr_second'])
    seed_everything(seed)
    nets = {name: IpsiDualNet(**DETECTORS[name], **BOXES, **HRNET) for name in names}
    for net in nets.values():
        net.start_from(first).to(memory_format=torch.channels_last)
    return kept(path, SecondStages(nets), train).detectors

def bi_network(seed, prepared, geometry, rows, first, path, times=1):
    "`bi`, from the HRNet of `first`"
    def train(model):
        dls = make_loaders(seed, prepared, geometry, rows)
        return fit_variant(model, 'bi', seed, dls, times*TRAIN['bi'], TRAIN['lr_bi'])
    seed_everything(seed)
    model = BiDualNet(**HRNET)
    model.encoder.load_state_dict(first.pyramid.encoder.state_dict())
    return kept(path, model, train)

def maps_of(nets, prepared, geometry, rows):
    "Maps of some images by `ipsi` and `bi`"
    dataset = ThreeViewDataset(
        prepared, rows, nipples=geometry['nipples'], flows=geometry['flows'], in_memory=False)
    return compute_maps(*nets, dataset)

# Jobs, each done once

class Run:
    "One training seed"
    def __init__(self, seed, base, prepared, rows, folder):
        self.seed, self.base, self.prepared, self.folder = seed, base, prepared, folder
        self.known = rows[rows.split != 'test']
        self.test = rows[rows.split == 'test']

    def path(self, name):
        return self.folder/f'{name}_{self.seed}.pt'

    def geometry(self, shuffled=False):
        "Nipples and flows of all images"
        found = read_geometry(self.prepared, self.base)
        if not shuffled:
            return found
        nipples = shuffle_nipples(found['nipples'], self.prepared)
        return found | dict(nipples=nipples, source='shuffled')

    def first(self, geometry):
        return first_network(self.seed, self.prepared, geometry, self.known, self.path('first'))

    def second(self, names, label, geometry):
        "Detectors that were trained together"
        first = self.first(geometry)
        return second_stages(
            names, self.seed, self.prepared, geometry, self.known, first, self.path(label))

    def bi(self, geometry):
        first = self.first(geometry)
        return bi_network(
            self.seed, self.prepared, geometry, self.known, first, self.path('bi'))

    def boxes(self, row, model, geometry):
        "Boxes of the test images, found once"
        def make():
            dataset = momminet_samples(
                self.prepared, self.test, model, nipples=geometry['nipples'],
                flows=geometry['flows'])
            table = predict(model, self.prepared, dataset=dataset)
            return [table[table.output == 'probability']]
        return tables_or_train(self.folder, f'{row}_{self.seed}', ('boxes',), make)[0]

def number_of_folds(run):
    "The fold of each training image"
    train = run.known[run.known.split == 'train']
    return patient_folds(run.prepared, train, ('mass',), TRAIN['folds'], run.seed)

def fold_maps(run, k):
    "Maps of the patients of a fold, by networks that do not know them"
    path = run.path(f'maps_fold{k}')
    if path.exists():
        return load_tensors(path)
    held_out = np.zeros(len(run.known), bool)
    held_out[(run.known.split == 'train').to_numpy()] = number_of_folds(run) == k
    rows, geometry = run.known[~held_out], run.geometry()
    shared = run.seed, run.prepared, geometry, rows
    times = 2 # half of the patients: as many steps
    first = first_network(*shared, run.path(f'first_fold{k}'), times)
    detectors = second_stages(['ipsi'], *shared, first, run.path(f'second_fold{k}'), times)
    bi = bi_network(*shared, first, run.path(f'bi_fold{k}'), times)
    nets = detectors['ipsi'], bi
    maps = maps_of(nets, run.prepared, geometry, run.known[held_out])
    save_tensors(maps, path)
    return maps

TOGETHER = [name for name in DETECTORS if name != 'ipsi_shuffled_nipples']

def run_first(run):
    run.first(run.geometry())

def run_together(run):
    "All detectors with true nipples"
    geometry = run.geometry()
    nets = run.second(TOGETHER, 'second', geometry)
    return {row: run.boxes(row, nets[row], geometry | dict(flows=None)) for row in TOGETHER}

def run_shuffled(run):
    "The detector with nipples of other images"
    row, geometry = 'ipsi_shuffled_nipples', run.geometry(shuffled=True)
    nets = run.second([row], row, geometry)
    return {row: run.boxes(row, nets[row], geometry | dict(flows=None))}

def run_bi(run):
    "`bi`"
    geometry = run.geometry()
    return dict(bi=run.boxes('bi', run.bi(geometry), geometry))

def run_tri(run):
    "`tri`, after its parts"
    geometry = run.geometry()
    nets = run.second(TOGETHER, 'second', geometry)['ipsi'], run.bi(geometry)
    maps = {}
    for k in range(TRAIN['folds']):
        maps |= fold_maps(run, k)
    few = run.known[run.known.split == 'valid'].head(TRAIN['bs']) # the loaders want some
    maps |= maps_of(nets, run.prepared, geometry, few)
    rows = pd.concat([run.known[run.known.split == 'train'], few])
    def train(model):
        dls = make_loaders(run.seed, run.prepared, geometry, rows, maps)
        return fit_variant(model, 'tri', run.seed, dls, FUSION['epochs'], FUSION['lr'])
    seed_everything(run.seed)
    name = f'tri_{tag(FUSION, inspect.getsource(run_tri))}'
    options = dict(width=FUSION['width'], mass_pixels=FUSION['mass_pixels'])
    model = kept(run.path(name), IntegratedFusionNet(*nets, **options), train)
    return dict(tri=run.boxes(name, model, geometry))

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

def run_blobs(prepared, rows):
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
    return dict(blobs=detections_table(own, found, scores, 'blobs', 'probability', '1'))

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
                  hrnet=HRNET, boxes=BOXES, train=TRAIN, fusion=FUSION)
    cost = 'about an hour on 2 cores, most of it to train'
    bench = Bench('momminet', a.seed, config, cost, train_seeds=a.train_seeds)
    if bench.finished('ipsi - ipsi_shuffled_nipples', 'recall_2'):
        return
    cohort = select_patients(a.patients, a.test_of, a.seed)
    prepared, base = prepare_insilico(cohort, f'{a.patients}_{a.test_of}', SIZE)
    rows = three_view_cases(prepared.cohort)
    read_geometry(prepared, base)
    functions = (SecondStages, make_loaders, fit, fit_variant, first_network, second_stages,
                 bi_network, maps_of, Run, fold_maps, run_together, run_shuffled, run_bi)
    recipe = (SIZE, HRNET, BOXES, TRAIN, DETECTORS)
    folder = recipe_folder(base, 'momminet', recipe, functions, MODULES)
    seeds = [Run(seed, base, prepared, rows, folder) for seed in a.train_seeds]
    parts = range(TRAIN['folds'])
    run_jobs([*((fold_maps, r, k) for r in seeds for k in parts), *((run_first, r) for r in seeds)])
    jobs = [(job, r) for job in (run_together, run_shuffled, run_bi) for r in seeds]
    found = run_jobs([*jobs, (run_blobs, prepared, rows)]) + run_jobs([(run_tri, r) for r in seeds])
    runs = {row: [tables[row] for tables in found if row in tables] for row in ROWS}
    test_ids = rows.image_id[rows.split == 'test']
    findings = prepared.cohort.findings
    own = findings[(findings.kind == 'mass') & findings.image_id.isin(test_ids)]
    add_rows(bench, runs, own)

if __name__ == '__main__':
    main()
