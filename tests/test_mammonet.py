"Mammo-Net: what the notebooks show badly (two processes, files that vanish), and each check of its specification."
import math, os, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from processes import SERVER
from torch import nn
from torch.nn import functional as F
import mammo_nb.core.fastai_import
from fastai import distributed  # gives learners `to_parallel`
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import seed_everything
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.cohort.exams import breast_table
from mammo_nb.gaze.heatmap import perturb_gaze, gaze_to_heatmap
from mammo_nb.gaze.fixations import find_fixations
from mammo_nb.gaze.readings import read_gaze
from mammo_nb.insilico.files import insilico_cohort, write_insilico
from mammo_nb.preparation.prepare import PrepareConfig
from mammo_nb.samples.augment import Augment
from mammo_nb.samples.two_view import TwoViewDataset, TwoViewInputs, TwoViewTargets, two_view_dls
from mammo_nb.learners.mammonet import attention_maps, choose_weights, mammonet_learner
from mammo_nb.learners.systems import predict
from mammo_nb.losses.attention import gaussian_pyramid, pyramid_loss, scanpath_loss
from mammo_nb.losses.contrastive import bidirectional_fusion_loss
from mammo_nb.losses.mammonet import MammoNetLoss
from mammo_nb.models.mammonet import MammoNet

SMALL = dict(encoder='small', stride=8, model_args=dict(width=8, heads=2, head_dim=8, embed=16, hidden=8))

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    d = tmp_path_factory.mktemp('gaze')
    return prepare_cohort(write_insilico(insilico_cohort(12, seed=4, exams=1), d/'files', progress=False), d/'cache', PrepareConfig(size=(96, 72)), progress=False)

# -- several processes; the losses themselves are tested in test_losses.py

def train_wrapped(rank, store, out):
    "Three steps of a network as fastai and accelerate wrap it; the names of parameters without a gradient"
    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    try:
        seed_everything(0)
        sizes = SMALL['model_args'] | dict(dropout=0., fusion=False)
        net = torch.nn.parallel.DistributedDataParallel(MammoNet('small', stride=8, **sizes))
        g = torch.Generator().manual_seed(rank)
        x = {f'image_{v}': torch.rand(4, 1, 64, 48, generator=g) for v in ('cc', 'mlo')}
        y = {f'gaze_{v}': torch.rand(4, 1, 8, 6, generator=g) for v in ('cc', 'mlo')}
        y |= dict(label=torch.tensor([1., 0]*2), has_gaze=torch.ones(4, 2))
        for _ in range(3):
            net.zero_grad()
            MammoNetLoss(.5, 0.)(net(x), y).backward()
        without = [name for name, p in net.named_parameters() if p.grad is None]
        out.put((without, sum(float(p.grad.abs().sum()) for p in net.parameters())))
    finally: torch.distributed.destroy_process_group()

def test_two_processes_train_one_network(tmp_path):
    "Each has images of its own, and both have the same gradient"
    out = SERVER.Queue()
    processes = [SERVER.Process(target=train_wrapped, args=(rank, tmp_path/'store', out)) for rank in range(2)]
    for p in processes: p.start()
    (one, a), (other, b) = [out.get(timeout=120) for _ in processes]
    for p in processes:
        p.join(60)
        assert p.exitcode == 0
    assert one == other == [] and a == b > 0

def test_losses_of_single_breasts_and_the_wrapper_of_several_gpus(prepared):
    dls = two_view_dls(prepared, bs=4, gaze=True, seed=0, augment=None)
    learn = mammonet_learner(dls, 'mammonet', **SMALL, seed=0)
    with learn.no_bar(), learn.no_logging():
        each = learn.get_preds(with_loss=True)[2]
        assert each.shape == (len(dls.valid_ds),) and each.isfinite().all()
        assert np.isclose(each.mean(), learn.validate()[0], rtol=1e-5)
        learn.to_parallel()
        learn.fit(1)  # ends with the weights of the best epoch, without the wrapper
    assert learn.keep_best.epoch_of_best == 0 and not isinstance(learn.model, nn.DataParallel)

# -- gaze is for training only (5)

def test_gaze_files_may_vanish(prepared):
    dls = two_view_dls(prepared, bs=4, gaze=True, seed=0)
    learn = mammonet_learner(dls, 'mammonet', **SMALL, seed=0)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    before, maps = predict(learn, prepared, split='test'), attention_maps(learn, prepared, split='test')
    moved = {prepared.cohort.file(p): prepared.cohort.file(p).read_bytes() for p in prepared.cohort.images.gaze_path}
    try:
        for f in moved: f.unlink()
        after, again = predict(learn, prepared, split='test'), attention_maps(learn, prepared, split='test')
    finally:
        for f, b in moved.items(): f.write_bytes(b)
    assert before['value'].tolist() == after['value'].tolist() and all((maps[k] == again[k]).all() for k in maps)

def test_gaze_on_pictures_whose_table_knows_the_spacing(tmp_path):
    "PNG files say no spacing, the images table does: the same maps as from DICOM"
    maps = {}
    for kind in ('dicom', 'png'):
        files = write_insilico(insilico_cohort(6, seed=3, rows=96, cols=72, pixel_spacing_mm=2.5, exams=1), tmp_path/kind, format=kind, workers=1, progress=False)
        p = prepare_cohort(files, tmp_path/f'{kind}_cache', PrepareConfig(size=(64, 48)), workers=1, progress=False)
        maps[kind] = TwoViewDataset(p, breast_table(files), gaze=True).gaze_maps
    assert maps['png'].keys() == maps['dicom'].keys() and len(maps['png'])
    near = [torch.corrcoef(torch.stack([maps['png'][k].flatten(), g.flatten()]))[0, 1] for k, g in maps['dicom'].items() if g is not None]
    assert min(near) > .95  # the two kinds of file are cropped by a pixel more or less

def test_one_reading_for_two_pictures(prepared):
    "A log that cannot tell two pictures apart would teach one by the other's gaze"
    was, paths = prepared.cohort.images.gaze_path.copy(), prepared.cohort.images.path.copy()
    two = prepared.cohort.images.index[:2]
    try:
        read_gaze(prepared.cohort.file(was[two[0]])).to_csv(prepared.cohort.root/'one.csv', index=False)
        prepared.cohort.images.loc[two, 'gaze_path'] = 'one.csv'
        with pytest.raises(ValueError, match='one.csv: reading: found one, for .* and for .*tell images apart'): TwoViewDataset(prepared, breast_table(prepared.cohort), gaze=True)
        prepared.cohort.images['gaze_path'] = was
        split = prepared.cohort.images.split  # also where one is learned from and the other watched
        prepared.cohort.images.loc[[split.eq(k).idxmax() for k in ('train', 'valid')], 'gaze_path'] = 'one.csv'
        with pytest.raises(ValueError, match='one.csv: reading: found one, for .* and for .*tell images apart'): two_view_dls(prepared, bs=4, gaze=True)
        prepared.cohort.images['gaze_path'] = was
        one, other = (prepared.cohort.images[split == k].iloc[0] for k in ('train', 'test'))  # also where the other is never looked at
        (prepared.cohort.root/'one.csv').write_text(f'D:\\A\\{Path(one.path).stem}.png;1;[[5, 6]];[];(-1, -1)\n')
        for k, (path, twin) in enumerate((('A/', one), ('B/', other))): prepared.cohort.images.loc[twin.name, ['gaze_path', 'path']] = 'one.csv', path + Path(one.path).name
        with pytest.raises(ValueError, match='one.csv: reading: found one, for .* and for .*tell images apart'): two_view_dls(prepared, bs=4, gaze=True)
        prepared.cohort.images.loc[other.name, 'path'] = 'B/another.dcm'
        two_view_dls(prepared, bs=4, gaze=True)
    finally: prepared.cohort.images['gaze_path'], prepared.cohort.images['path'] = was, paths

def test_two_readers_of_a_picture(prepared):
    "Each reading is cut into its own parts: the same reading twice teaches the same order as once"
    was, image = prepared.cohort.images.gaze_path.copy(), prepared.cohort.images.iloc[0].image_id
    g = read_gaze(prepared.cohort.file(was.iloc[0]))
    part = lambda: TwoViewDataset(prepared, breast_table(prepared.cohort), gaze=True, gaze_slices=3).gaze_maps[image]
    try:
        once = part()
        both = pd.concat([g, g.assign(reading=1)])
        both.to_csv(prepared.cohort.root/'both.csv', index=False)
        prepared.cohort.images.loc[prepared.cohort.images.index[0], 'gaze_path'] = 'both.csv'
        assert torch.allclose(part(), once, atol=1e-5) and (once[0]-once[2]).abs().max() > .05
        looks = lambda image_id, g: find_fixations(g.assign(time_ms=g.duration_ms.cumsum()), 20)  # a function that makes fixations of them leaves them two
        ds = TwoViewDataset(prepared, breast_table(prepared.cohort), gaze=looks, gaze_slices=3)
        prepared.cohort.images.loc[prepared.cohort.images.index[0], 'gaze_path'] = was.iloc[0]
        assert torch.allclose(ds.gaze_maps[image], TwoViewDataset(prepared, breast_table(prepared.cohort), gaze=looks, gaze_slices=3).gaze_maps[image], atol=1e-5)
        prepared.cohort.images.loc[prepared.cohort.images.index[0], 'gaze_path'] = 'both.csv'
        both.drop(columns='reading').to_csv(prepared.cohort.root/'both.csv', index=False)
        assert not torch.allclose(part(), once, atol=.05)
    finally: prepared.cohort.images['gaze_path'] = was

def test_a_window_that_was_not_told(prepared, tmp_path):
    "Gaze that keeps to the upper left of every picture was recorded on smaller ones"
    images = prepared.cohort.images.copy()
    was = prepared.cohort.images.gaze_path.copy()
    try:
        for k, r in enumerate(images.dropna(subset='gaze_path').itertuples()):
            g = read_gaze(prepared.cohort.file(r.gaze_path))
            name = f'small_{r.image_id}.csv'
            if k == 0: g = g.assign(row=np.nan, col=np.nan)  # says nothing of the window
            g.assign(row=g.row*.3, col=g.col*.3).to_csv(prepared.cohort.root/name, index=False)
            prepared.cohort.images.loc[r.Index, 'gaze_path'] = name
        with pytest.raises(ValueError, match='gaze_display_rows: found None, and on none of'): TwoViewDataset(prepared, breast_table(prepared.cohort), gaze=True)
    finally: prepared.cohort.images['gaze_path'] = was

def test_a_breast_without_gaze_teaches_by_its_label_only(prepared):
    full, part = (TwoViewDataset(prepared, two_view_dls(prepared, bs=4, gaze=True).train_ds.rows, gaze=g) for g in (True, lambda i, g: None))
    seed_everything(0)
    net = MammoNet('small', stride=8, width=8, embed=16, hidden=8, heads=2, head_dim=8, dropout=0.).eval()
    batch = lambda ds: tuple({k: torch.stack([s[j][k] for s in (ds[0], ds[1], ds[2])]) for k in ds[0][j]} for j in range(2))
    def grads(loss, ds):
        x, y = batch(ds)
        net.zero_grad()
        loss(net(x), y).backward()
        return {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}
    a, b = grads(MammoNetLoss(.5, 0), part), grads(MammoNetLoss(0, 0), part)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = grads(MammoNetLoss(.5, 0), full), grads(MammoNetLoss(0, 0), full)
    assert a.keys() == b.keys() and any(not torch.equal(a[k], b[k]) for k in a)

def test_the_augmented_gaze_is_where_the_augmented_lesion_is(prepared):
    "A bright spot and a look at it go through the same movement"
    seed_everything(0)
    spots, x, y = torch.tensor([[40., 30.], [60., 20.], [30., 40.]]), {}, dict(label=torch.ones(3), has_gaze=torch.ones(3, 2))
    at = lambda p, s: torch.exp(-((torch.arange(96.)[:, None]+.5-p[0])**2+(torch.arange(72.)+.5-p[1])**2)/(2*s*s))
    for v in ('cc', 'mlo'):
        x[f'image_{v}'] = torch.stack([at(p, 3.)[None] for p in spots])
        y[f'gaze_{v}'] = torch.stack([torch.from_numpy(gaze_to_heatmap([p.tolist()], None, (96, 72), sigma_px=4, stride=4, n_slices=1)[0]) for p in spots])
    x, y = TwoViewInputs(x), TwoViewTargets(y)
    a, b = Augment(rotate=20, shift=.1, scale=.1, gain=0, gamma=0, flip=.5)((x, y), split_idx=0)
    def centre(m):
        m = m[:, 0]
        h, w = m.shape[1:]
        m = m/m.sum((1, 2), keepdim=True)
        return torch.stack([(m.sum(2)*(torch.arange(h)+.5)/h).sum(1), (m.sum(1)*(torch.arange(w)+.5)/w).sum(1)], 1)
    for v in ('cc', 'mlo'): assert (centre(a[f'image_{v}'])-centre(b[f'gaze_{v}'])).abs().max() < .02

# -- dwell (8)

# -- fastai's machinery

def test_learner_finds_rates_exports_and_comes_back(prepared, tmp_path):
    from fastai.learner import load_learner
    dls = two_view_dls(prepared, bs=4, gaze=True, seed=0)
    learn = mammonet_learner(dls, 'mammonet', **SMALL, seed=0, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=5, show_plot=False)
        learn.fit(1)
        want = learn.get_preds()[0]
        learn.export('m.pkl')
        again = load_learner(tmp_path/'m.pkl', cpu=True)
    x, _ = dls.valid.one_batch()
    with torch.no_grad(): a, b = (m.eval()(x)['logit'] for m in (learn.model.cpu(), again.model))
    assert torch.equal(a, b) and len(want) == len(dls.valid_ds)

def test_gaze_works_in_worker_processes(prepared):
    one, two = (next(iter(two_view_dls(prepared, bs=4, gaze=True, seed=0, augment=None, num_workers=n).valid)) for n in (0, 2))
    assert torch.equal(one[1]['gaze_cc'], two[1]['gaze_cc']) and one[1]['has_gaze'].all()

def test_the_command_takes_a_mammonet(prepared, tmp_path):
    from mammo_nb.cli.predict import mammo_predict
    from mammo_nb.learners.systems import load_model
    import pandas as pd
    learn = mammonet_learner(two_view_dls(prepared, bs=4, gaze=True, seed=0), 'mammonet', **SMALL, seed=0)
    about = learn.model.save_pretrained(tmp_path/'m')
    want = predict(load_model(about), prepared)
    assert mammo_predict(str(prepared.cohort.root), model=str(about), out=str(tmp_path/'out'), quiet=True) == 0
    got = pd.read_csv(tmp_path/'out/predictions.csv', dtype=dict(patient_id=str, exam_id=str))
    both = want.merge(got, on=['patient_id', 'exam_id', 'laterality', 'output'])
    assert len(both) == len(want) and np.allclose(both.value_x, both.value_y, atol=1e-6) and set(got.system) == {'mammonet'}
    assert len(list((tmp_path/'out').rglob('*.png'))) == len(want)

# -- results of a search that belong to other images, labels, gaze or settings

TRY = dict(gaze_weights=(.5,), fusion_weights=(.2,), folds=3, progress=False, bs=4, seed=0, device='cpu')

@pytest.fixture(scope='module')
def searched(tmp_path_factory):
    "Prepared images, and a function that counts the trainings of a search; the results are in one file"
    d = tmp_path_factory.mktemp('search')
    cohort = write_insilico(insilico_cohort(30, seed=5, exams=1, rows=96, cols=72, pixel_spacing_mm=2.5), d/'files', workers=1, progress=False)

    def prepare(cohort=cohort, size=(64, 48)):
        return prepare_cohort(cohort, d/'cache', PrepareConfig(size=size), workers=1, progress=False)

    def search(prepared, **kwargs):
        fits = []
        def fit(dls, gaze_weight, fusion_weight):
            fits.append(dls)
            seed_everything(0)
            return MammoNet('small', stride=8, width=4, embed=8, hidden=8, heads=2, head_dim=4)
        choose_weights(prepared, fit, **TRY | dict(path=d/'weights.csv') | kwargs)
        return len(fits)
    assert search(prepare()) == 3 and search(prepare()) == 0
    return prepare, search

def test_a_search_knows_its_images(searched):
    "Results of images of 64 x 48 were returned for images of 32 x 24"
    prepare, search = searched
    with pytest.raises(InputError, match='same patients and images'): search(prepare(size=(32, 24)))

def test_a_search_knows_its_labels(searched):
    prepare, search = searched
    cohort = prepare().cohort
    followed = cohort.images.years_followed + 1
    with pytest.raises(InputError, match='same patients and images'):
        search(prepare(Cohort(cohort.images.assign(years_followed=followed), cohort.findings, cohort.root)))

def test_a_search_knows_its_pixels(searched, tmp_path):
    prepare, search = searched
    files = prepare().cohort
    shutil.copytree(files.root, tmp_path/'files')
    one, other = files.images[files.images.split == 'train'].path[:2]
    copied = Cohort(files.images, files.findings, tmp_path/'files')
    assert search(prepare(copied)) == 0  # the folder does not matter
    for source, target in ((one, other), (other, one)): shutil.copy(files.root/source, tmp_path/'files'/target)
    with pytest.raises(InputError, match='same patients and images'): search(prepare(copied))

@pytest.mark.parametrize('same', [dict(num_workers=1), dict(in_memory=False), dict(device=torch.device('cpu')), dict(gaze_sigma=6.)])
def test_a_search_ignores_what_changes_no_result(searched, same):
    "Finished folds were refused"
    prepare, search = searched
    assert search(prepare(), **same) == 0

@pytest.mark.parametrize('column', ['gaze_path', 'pixel_spacing_mm'])
def test_a_search_knows_whose_gaze_it_is(searched, tmp_path, column):
    "Logs that were exchanged, or another spacing, which is the width of the blur in pixels, gave the earlier results"
    prepare, search = searched
    cohort, path = prepare().cohort, tmp_path/'gaze.csv'
    assert search(prepare(), path=path, gaze=True) == 3
    images = cohort.images.copy()
    if column == 'gaze_path':
        one, other = images.index[images.split == 'train'][:2]
        images.loc[[one, other], column] = images.loc[[other, one], column].to_numpy()
    else: images[column] *= 1.5
    with pytest.raises(InputError, match='same patients and images'):
        search(prepare(Cohort(images, cohort.findings, cohort.root)), path=path, gaze=True)

def keep_all(image_id, gaze):
    return gaze

def test_a_search_knows_its_gaze(searched, tmp_path):
    "Two functions without a name were the same, and so were two logs"
    prepare, search = searched
    path = tmp_path/'gaze.csv'
    share = lambda part: lambda image_id, gaze: gaze[:int(part*len(gaze))]
    assert search(prepare(), path=path, gaze=share(.5)) == 3
    assert search(prepare(), path=path, gaze=share(.5)) == 0
    for gaze in (share(.6), lambda image_id, gaze: gaze[::2], keep_all, True):
        with pytest.raises(InputError, match='same patients and images'): search(prepare(), path=path, gaze=gaze)
    cohort = prepare().cohort
    shutil.copytree(cohort.root, tmp_path/'files')
    log = tmp_path/'files'/cohort.images.gaze_path[cohort.images.split == 'train'].iloc[0]
    log.write_text(log.read_text()[:-1]+'\n\n')
    with pytest.raises(InputError, match='same patients and images'):
        search(prepare(Cohort(cohort.images, cohort.findings, tmp_path/'files')), path=path, gaze=share(.5))

@pytest.mark.parametrize('text, message', [('a,b\n1,2\n', 'no gaze_weight, fusion_weight, fold, auc, patients'), ('', 'EmptyDataError'), ('a\n"', 'ParserError')])
def test_a_file_of_something_else_is_named(searched, tmp_path, text, message):
    "It was an error of pandas"
    prepare, search = searched
    (tmp_path/'other.csv').write_text(text)
    with pytest.raises(InputError, match=message) as e: search(prepare(), path=tmp_path/'other.csv')
    assert e.value.where == str(tmp_path/'other.csv')

SETTINGS = """
from functools import partial
from mammo_nb.core.describe import describe_value
from mammo_nb.samples.augment import Augment
NOISE = 3.
class Reader:
    def __init__(self, share): self.share = share
    def read(self, image_id, gaze): return gaze[:self.share]
def recursive():
    def f(n): return n and f(n-1)
    return f
text = describe_value(dict(
    gaze=lambda i, g: g if i in {'a', 'b', 'c', 'd'} else [x for x in g if x > NOISE], other=partial(max, key=len),
    method=Reader(.5).read, recursive=recursive(), augment=Augment(rotate=3), rows=[print, (1, 2.5)], kind=dict))
"""

def test_settings_are_the_same_in_every_process(tmp_path):
    texts = []
    for seed in '12':
        line = [sys.executable, '-c', SETTINGS+'print(text)']
        env = os.environ | dict(PYTHONHASHSEED=seed, OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parents[1]))
        texts.append(subprocess.run(line, capture_output=True, text=True, check=True, env=env).stdout)
    assert len(set(texts)) == 1 and ' at 0x' not in texts[0]

@pytest.mark.parametrize('a, b', [('NOISE = 3.', 'NOISE = 4.'), ('x > NOISE', 'x < NOISE'), ("'c', 'd'", "'c', 'e'"), ('key=len', 'key=abs'), ('Reader(.5)', 'Reader(.4)'), ('n-1', 'n-2'), ('rotate=3', 'rotate=4')])
def test_each_setting_counts(a, b):
    before, after = {}, {}
    exec(SETTINGS, before)
    exec(SETTINGS.replace(a, b), after)
    assert before['text'] != after['text']
