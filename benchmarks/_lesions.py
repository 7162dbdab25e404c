"""Patients, networks and drawings that the benchmarks of LesionLDM share.

The patients are those of `insilico-v1` with one exam and many masses, benign and malignant. Patches are 64 x 64
pixels (44 mm), cut one to one; a mass measures 7 to 27 pixels. All networks learn from training patients only. What
is trained and drawn lies below `.cache/`.
"""
import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from benchmarks._bench import Bench
from benchmarks._trainings import (
    load_tensors, prepare_insilico, recipe_folder, run_jobs, save_tensors, weights_or_train
)
from mammo_nb.core.monitor import usable_cores
from mammo_nb.core.seeding import rng_for, seed_everything
from mammo_nb.insilico.config import InSilicoConfig, settings_name
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.lesion_autoencoder import autoencoder_learner
from mammo_nb.learners.lesion_ldm import lesion_ldm_learner
from mammo_nb.learners.lesion_verifier import verifier_learner
from mammo_nb.learners.momminet import momminet_dls, momminet_learner
from mammo_nb.models.autoencoder import PatchAutoencoder
from mammo_nb.models.ipsidual import IpsiDualNet
from mammo_nb.models.lesion_ldm import LesionLDM
from mammo_nb.models.lesion_verifier import LesionVerifier, verifier_targets
from mammo_nb.samples.lesion_synthesis import (
    LesionSynthesisDataset, healthy_patches, lesion_dls, lesion_patches
)
from mammo_nb.samples.loaders import prediction_dl
from mammo_nb.samples.three_views import three_view_cases

SIZE = (256, 192)
COHORT = dict(exams=1, benign=1., prevalence=.8, calcified=0.)
WINDOW = dict(size=64, context=None)
HEALTHY = .5 # patches of healthy tissue for each lesion
AUTOENCODER = dict(latent_channels=8, channels=(16, 32, 64), blocks=1, attention=False)
NET = dict(
    size=64, dim=64, vit=dict(dim=64, depth=2, heads=4, patch=8), schedule=dict(prediction='v_prediction'),
    denoiser='transformer', denoiser_args=dict(width=128, depth=4, heads=4))
TRAIN = dict(
    autoencoder=dict(epochs=7, lr=2e-3, bs=32), diffusion=dict(epochs=24, lr=1e-3, bs=32, ema=.999),
    verifier=dict(epochs=8, lr=3e-3, bs=32), detector=dict(epochs=5, lr=2e-3, bs=16))
HRNET = dict(width=8, stem=16, modules=(1, 1, 1), blocks=1, finest=4, sigma=6.)
BOXES = dict(
    channels=32, dim=64, heads=4, roi_size=5, anchor_scale=2.5, n_proposals=64, n_other=48, n_sampled=32)
SAMPLING = dict(steps=50, guidance=2., scheduler='ddim')
CHUNK = 62 # drawings of a job

# Data

def make_data(patients, seed):
    "The prepared cohort, its folder, and the rows of lesions and healthy tissue"
    cohort = insilico_cohort(patients, seed, **COHORT)
    prepared, base = prepare_insilico(cohort, f'lesions_{patients}', SIZE)
    rows = lesion_patches(prepared.cohort)
    healthy = healthy_patches(prepared, rows, HEALTHY)
    return prepared, base, pd.concat([rows, healthy], ignore_index=True)

def samples(prepared, rows):
    "The patches of some rows"
    return LesionSynthesisDataset(prepared, rows.reset_index(drop=True), in_memory=False, **WINDOW)

def ask_other(rows, seed):
    "Rows that ask each place for the mass (or none) and the BI-RADS category of another one"
    order = rng_for(seed, 'asked').permutation(len(rows))
    asked = rows[['kinds', 'birads', 'label']].iloc[order]
    return rows.assign(**{name: asked[name].array for name in asked})

def loaders(prepared, rows, bs, seed, augment=None):
    "Loaders of training and validation patches"
    return lesion_dls(
        prepared, rows=rows[rows.split != 'test'], bs=bs, augment=augment, seed=seed, in_memory=True,
        device='cpu', **WINDOW)

def gather(dataset):
    "All inputs, and all true patches, of a dataset"
    (inputs, targets), = prediction_dl(dataset, bs=len(dataset))
    return inputs, targets['image']

# Training

def fit(learn, epochs, lr):
    "Train without a word"
    learn.metrics = []
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, lr)
    return learn.model.eval()

def weights_path(base, name, seed, module, functions, *recipe):
    "Where the weights of a recipe and its code are kept"
    settings = dict(window=WINDOW, healthy=HEALTHY, train=TRAIN[name], recipe=recipe)
    modules = f'mammo_nb.learners.{module}', 'mammo_nb.preparation.cache'
    folder = recipe_folder(base, f'lesion_{name}', settings, [fit, *functions], modules)
    folder.mkdir(parents=True, exist_ok=True)
    return folder/f'{seed}.pt'

def train_autoencoder(prepared, rows, seed, base):
    def train(model):
        own = TRAIN['autoencoder']
        dls = loaders(prepared, rows, own['bs'], seed, augment=True)
        return fit(autoencoder_learner(dls, model, keep_best=False, seed=seed), own['epochs'], own['lr'])
    path = weights_path(
        base, 'autoencoder', seed, 'lesion_autoencoder', [train_autoencoder, loaders], AUTOENCODER)
    seed_everything(seed)
    return weights_or_train(path, PatchAutoencoder(**AUTOENCODER), train)

def train_diffusion(autoencoder, prepared, rows, seed, path, epochs=None):
    "The diffusion in the latents of a trained autoencoder"
    def train(model):
        own = TRAIN['diffusion']
        dls = loaders(prepared, rows, own['bs'], seed)
        learn = lesion_ldm_learner(dls, model=model, ema=own['ema'], seed=seed)
        return fit(learn, epochs or own['epochs'], own['lr'])
    seed_everything(seed)
    return weights_or_train(path, LesionLDM(autoencoder, **NET), train)

def train_verifier(prepared, rows, seed, base):
    def train(model):
        own = TRAIN['verifier']
        dls = loaders(prepared, rows, own['bs'], seed, augment=True)
        learn = verifier_learner(dls, model=model, seed=seed, keep_best=False)
        return fit(learn, own['epochs'], own['lr'])
    path = weights_path(base, 'verifier', seed, 'lesion_verifier', [train_verifier, loaders])
    seed_everything(seed)
    return weights_or_train(path, LesionVerifier(buckets='suspicious'), train)

def train_detector(prepared, seed, base):
    "MommiNet-v2's detector of single views, on whole images"
    def train(model):
        own = TRAIN['detector']
        cases = three_view_cases(prepared.cohort).assign(image_id_ipsilateral=None, image_id_contralateral=None)
        cases = cases[cases.split != 'test']
        dls = momminet_dls(
            prepared, nipples='tabled', aligned=False, rows=cases, bs=own['bs'], seed=seed, device='cpu',
            in_memory=True)
        return fit(momminet_learner(dls, 'single', model=model, seed=seed, keep_best=False), own['epochs'], own['lr'])
    path = weights_path(base, 'detector', seed, 'momminet', [train_detector], HRNET, BOXES)
    seed_everything(seed)
    return weights_or_train(path, IpsiDualNet(ipsilateral=False, **BOXES, **HRNET), train)

def train_judges(prepared, rows, seed, base):
    train_verifier(prepared, rows, seed, base)
    train_detector(prepared, seed, base)

def train_all(prepared, rows, seed, base):
    "LesionLDM, verifier and detector, each trained once, and the folder of LesionLDM"
    run_jobs([(train_autoencoder, prepared, rows, seed, base), (train_judges, prepared, rows, seed, base)])
    autoencoder = train_autoencoder(prepared, rows, seed, base)
    path = weights_path(
        base, 'diffusion', seed, 'lesion_ldm', [train_diffusion, loaders, ask_other, draw, draw_part], NET, AUTOENCODER,
        TRAIN['autoencoder'])
    torch.set_num_threads(usable_cores())
    model = train_diffusion(autoencoder, prepared, rows, seed, path)
    judges = train_verifier(prepared, rows, seed, base), train_detector(prepared, seed, base)
    return path.parent, (model, *judges)

def recipe():
    return dict(size=SIZE, window=WINDOW, healthy=HEALTHY, autoencoder=AUTOENCODER, net=NET, train=TRAIN,
                hrnet=HRNET, boxes=BOXES)

def trained(a):
    "Data and networks of a run: prepared images, rows, folder, and (LesionLDM, verifier, detector)"
    prepared, base, rows = make_data(a.patients, a.seed)
    return prepared, rows, *train_all(prepared, rows, a.train_seed, base)

def start(name, a, cost, **settings):
    "Open the results of a run"
    cohort = settings_name(InSilicoConfig(seed=a.seed, **COHORT))
    config = recipe() | dict(cohort=cohort, patients=a.patients, sampling=SAMPLING) | settings
    return Bench(name, a.seed, config, cost, train_seeds=[a.train_seed])

# Drawing

def part_of(inputs, numbers):
    return {name: values[numbers].clone() for name, values in inputs.items()}

def draw_part(model, inputs, seeds, sampling):
    "Draw in batches of 32"
    parts = []
    for numbers in torch.arange(len(seeds)).split(32):
        own = [seeds[k] for k in numbers.tolist()]
        parts.append(model.sample(part_of(inputs, numbers), seed=own, **sampling))
    return torch.cat(parts)

def draw(model, inputs, seed, sampling=None):
    "[N,1,S,S] drawings, on all cores"
    jobs = []
    for numbers in torch.arange(len(inputs['mask'])).split(CHUNK):
        seeds = [1000003*seed+k for k in numbers.tolist()]
        jobs.append((draw_part, model, part_of(inputs, numbers), seeds, sampling or SAMPLING))
    return torch.cat(run_jobs(jobs))

def draw_once(path, *args):
    "Drawings that are kept"
    if not path.exists():
        save_tensors(dict(drawn=draw(*args)), path)
    return load_tensors(path)['drawn']

# The rival that costs nothing

def hole_boxes(mask):
    "[N,4] pixels: the holes"
    boxes = []
    for own in mask[:, 0]:
        rows, columns = (torch.nonzero(own.any(axis)).flatten() for axis in (1, 0))
        boxes.append([columns[0], rows[0], columns[-1]+1, rows[-1]+1])
    return torch.tensor(boxes)

def suspicion(inputs):
    "[N] what is asked for: 0 healthy, 1 a mass of BI-RADS up to 3, 2 above"
    targets = verifier_targets(inputs, 'suspicious')
    return targets['mass']*(1+targets['birads'].clamp(min=0))

def nearest_donors(asked, inputs, k):
    "[N] positions of the training patch of the same class that is the k-th nearest in the size of its box"
    def sides(own):
        return own['box'][:, 2:]-own['box'][:, :2]
    far = torch.cdist(sides(asked), sides(inputs))
    other = suspicion(asked)[:, None] != suspicion(inputs)[None]
    return (far+1e3*other).topk(k+1, largest=False).indices[:, k]

def blend(patch, mask, box, donor, donor_box):
    "One patch with the hole of a donor, scaled, set to the level around the hole, blended over three pixels"
    x0, y0, x1, y1 = box.tolist()
    u0, v0, u1, v1 = donor_box.tolist()
    shape = y1-y0, x1-x0
    filling = F.interpolate(donor[None, :, v0:v1, u0:u1], shape, mode='bilinear', antialias=True)[0]
    ring = F.max_pool2d(mask[None].float(), 5, 1, 2)[0].bool() & ~mask
    around = patch[ring].mean() if ring.any() else filling.mean()
    border = torch.ones(1, *shape, dtype=torch.bool)
    border[:, 2:-2, 2:-2] = False
    filling = (filling+around-filling[border].mean()).clamp(0, 1)
    out = patch.clone()
    out[:, y0:y1, x0:x1] = filling
    smooth = F.avg_pool2d(out[None], 3, 1, 1, count_include_pad=False)[0]
    edge = mask & (F.max_pool2d((~mask)[None].float(), 3, 1, 1)[0] > 0)
    return torch.where(edge, smooth, torch.where(mask, out, patch))

def copy_paste(asked, train, k=0):
    "[N,1,S,S]: holes filled with real lesions of training patients"
    inputs, images = train
    donors = nearest_donors(asked, inputs, k)
    boxes, donor_boxes = hole_boxes(asked['mask']), hole_boxes(inputs['mask'][donors])
    parts = zip(asked['masked_image'], asked['mask'], boxes, images[donors], donor_boxes)
    return torch.stack([blend(*part) for part in parts])

# Agreement

HEADS = ('mass', 'birads') # what the content of a hole can change

def as_table(rows, values):
    "A row for each patch with a known value"
    table = pd.DataFrame(dict(patient_id=rows.patient_id, image_id=rows.finding_id, value=np.asarray(values, float)))
    return table.dropna().reset_index(drop=True)

def agreement(verifier, images, inputs, rows):
    "Share of the known heads that a verifier reads as they were asked for, for each patch"
    targets = verifier_targets(inputs, verifier.buckets)
    predicted = verifier.predict_attributes(images)
    shares = []
    for name in HEADS:
        right = (predicted[name] == targets[name]).float()
        shares.append(torch.where(targets[name] >= 0, right, torch.nan))
    return as_table(rows, torch.stack(shares).nanmean(0))
