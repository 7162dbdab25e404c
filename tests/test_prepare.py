"""Preparing: pixels and map agree, the plain route is matched, masks hold on real film, workers start light."""
import csv, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage.transform import resize
from mammo_nb.core.errors import InputError
from mammo_nb.data.dicom import read_stored
from mammo_nb.data.dicom_file import write_mammogram
from mammo_nb.data.prepare import PrepareConfig, plan, prepare

SHARED = Path(__file__).parents[2]/'shared'/'data'
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason='shared/data is not here')

def breast(rows=900, cols=700, side='L', dots=()):
    "A smooth drawn breast with small bright dots at (row, col), for a left breast"
    y, x = np.mgrid[:rows, :cols]+.5
    px = 2500*np.clip(1 - (x/(.7*cols))**2 - ((y-.5*rows)/(.42*rows))**2, 0, None)**.4
    for r, c in dots: px += 1400*np.exp(-((y-r)**2+(x-c)**2)/(2*6**2))
    px = px.astype(np.uint16)
    return px if side == 'L' else px[:, ::-1].copy()

CONFIGS = [PrepareConfig(), PrepareConfig(crop=False), PrepareConfig(size=(100, 128)), PrepareConfig(size=(1200, 1000)),
           PrepareConfig(size=(1200, 1000), enlarge=True), PrepareConfig(margin=.2), PrepareConfig(size=(640, 640), spacing_mm=.21)]

@pytest.mark.parametrize('config', CONFIGS, ids=lambda c: c.text)
@pytest.mark.parametrize('side', 'LR')
def test_pixels_and_map_agree(tmp_path, side, config):
    "A bright dot is found where the map sends it, to a tenth of a prepared pixel, and comes back"
    dots = np.array([(300.5, 200.), (450., 60.5), (600., 300.)])
    there = dots if side == 'L' else np.stack([dots[:, 0], 700-dots[:, 1]], 1)
    stored = read_stored(write_mammogram(tmp_path/'a.dcm', breast(side=side, dots=dots), side, 'CC', pixel_spacing_mm=.1))
    plain = read_stored(write_mammogram(tmp_path/'b.dcm', breast(side=side), side, 'CC', pixel_spacing_mm=.1))
    p, q = prepare(stored, side, config), prepare(plain, side, config)
    assert p.affine == q.affine and p.mirrored == (side == 'R')
    bump = (p.image - q.image)[0]
    for want in p.points(there):
        r, c = (int(v) for v in want)
        m = int(np.ceil(24*p.scale))
        part = bump[max(0, r-m):r+m+1, max(0, c-m):c+m+1]
        got = np.array(ndimage.center_of_mass(part)) + [max(0, r-m), max(0, c-m)] + .5
        assert np.abs(got-want).max() < max(.1, .15*p.scale), (got, want)
    assert np.abs(p.back_points(p.points(there)) - there).max() < 1e-6

@pytest.mark.parametrize('config', CONFIGS, ids=lambda c: c.text)
@pytest.mark.parametrize('side', 'LR')
def test_coordinates_come_through(side, config):
    "An image whose values are its own coordinates: every prepared pixel shows where it came from"
    px = breast(side=side)
    config = config if config.spacing_mm is None else PrepareConfig(size=(640, 640))
    p = prepare(px, side, config)
    y, x = np.mgrid[:px.shape[0], :px.shape[1]]+.5
    h, w = p.mask.shape
    rows, cols = np.nonzero(p.mask)
    want = p.back_points(np.stack([rows+.5, cols+.5], 1))
    f = 1/p.scale
    deep = ((want > 3*f) & (want < np.array(px.shape)-3*f)).all(1)   # reflection bends a ramp at the border of the image
    assert deep.sum() > .5*len(deep)
    got = np.stack([p.image_of(y)[rows, cols], p.image_of(x)[rows, cols]], 1)
    assert np.abs(got-want)[deep].max() < .02*f

@pytest.mark.parametrize('shape,size', [((900, 700), (384, 288)), ((2200, 1500), (300, 300)), ((2200, 1500), (640, 480)), ((500, 400), (384, 288))])
@pytest.mark.parametrize('side', 'LR')
def test_matches_the_plain_route(shape, size, side):
    "Within 1 % of skimage's anti-aliased resize of the same window, on textured images"
    rng = np.random.default_rng(1)
    px = breast(*shape, side)
    px = (px*(1 + .15*np.clip(ndimage.gaussian_filter(rng.standard_normal(shape), 2)*6, -2, 2))).astype(np.uint16)
    config = PrepareConfig(size=size)
    p, plan_ = prepare(px, side, config), plan(px, side, config)
    x0, y0, x1, y1 = plan_.window
    part = px[y0:y1, x0:x1].astype(np.float64)/65535
    ref = resize(part[:, ::-1] if plan_.mirror else part, plan_.shape, order=1, anti_aliasing=True)
    h, w = plan_.shape
    m = p.mask[:h, :w]
    assert np.abs(p.image[0, :h, :w]-ref)[m].mean() < .01*ref[m].mean()

def test_windows_cut_before_averaging(tmp_path):
    "A narrow window is not a line over the picture: it must be applied before averaging"
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.standard_normal((900, 700)), 3)
    px = np.where(breast() > 0, np.clip(2048 + 1000*noise/noise.std(), 1, 4095), 0).astype(np.uint16)
    path = write_mammogram(tmp_path/'a.dcm', px, 'L', 'CC', window=(2048, 200))
    stored, config = read_stored(path), PrepareConfig(size=(160, 120))
    p = prepare(stored, 'L', config)
    ref = p.image_of(stored.to_unit(stored.pixels, 'voi_lut'))
    deep = ndimage.binary_erosion(p.mask, iterations=4)  # away from the window's border, where `image_of` sees more
    assert np.abs(p.image[0]-ref)[deep].max() < 1e-3
    after = prepare(stored.pixels, 'L', config).image[0]*65535  # averaged first, the window would cut other values
    assert np.abs(np.clip((after-1948)/199, 0, 1)-ref)[deep].mean() > .02

def test_monochrome1_is_the_same_picture(tmp_path):
    px = breast()
    a = prepare(read_stored(write_mammogram(tmp_path/'a.dcm', px, 'L', 'CC')), 'L')
    b = prepare(read_stored(write_mammogram(tmp_path/'b.dcm', (4095-px).astype(np.uint16), 'L', 'CC', photometric='MONOCHROME1')), 'L')
    assert (a.mask == b.mask).all() and np.abs(a.image-b.image).max() < 1e-5

def test_digital_background_and_constant_fill():
    "Exact zero around the breast, and a breast that touches three borders"
    px = breast(600, 300)
    px[:, :120] = np.maximum(px[:, :120], 1500)  # tissue from top to bottom at the chest wall
    p = prepare(px, 'L')
    assert p.mask[:, 0].all() and not p.image[0][~p.mask].any()
    for bad in (np.full((300, 200), 9, np.uint16), np.zeros((300, 200), np.uint8), np.full((300, 200), np.nan)):
        with pytest.raises(InputError): prepare(bad, 'L')

def test_insilico_masks(tmp_path):
    "In-silico pictures, whose breast is known: the mask fits, lesions are in it, letters are not"
    from mammo_nb.data.cache import prepare_cohort
    from mammo_nb.data.insilico import insilico_cohort, parse_settings, truth, write_insilico
    cohort = write_insilico(insilico_cohort(2, seed=11, exams=1), tmp_path/'d', workers=1, progress=False)
    done, settings = prepare_cohort(cohort, tmp_path/'c', workers=1, progress=False), parse_settings(cohort.images.provenance[0])
    assert len(done) == len(cohort.images) == 8
    for o in cohort.images.itertuples():
        p, y = done.load(o.image_id), truth(settings, o.patient_index, o.exam_index, o.laterality, o.view)
        mask = p.back_mask(p.mask)
        assert (mask & y.breast).sum()/(mask | y.breast).sum() > .97, o.image_id
        assert p.scale == 1 and p.mirrored == (o.laterality == 'R') and abs(p.spacing_mm-o.pixel_spacing_mm) < 1e-6
        assert all(mask[m].all() for m in y.masks.values())

def test_workers_start_light():
    code = 'import sys, mammo_nb.data.cache; print([m for m in ("torch", "fastai", "pandas", "matplotlib", "skimage.filters", "sklearn") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout.strip() == '[]'

@needs_shared
def test_mini_mias():
    "252 films: every side right, the marked lesions inside the mask, the tags outside"
    folder = SHARED/'mini_mias_dev'
    with open(folder/'labels.csv', newline='') as f: rows = list(csv.DictReader(f))
    masks, inside = {}, []
    for r in rows:
        if r['image'] not in masks:
            p = prepare(np.asarray(Image.open(folder/'png512'/f'{r["image"]}.png')), r['side'], PrepareConfig(size=(512, 512)))
            assert p.mirrored == (r['side'] == 'R'), r['image']
            masks[r['image']] = p.back_mask(p.mask)
            assert .15 < p.mask.mean() < .95, r['image']
        if r['x']: inside.append(masks[r['image']][min(511, int(float(r['y_topleft_origin'])/2)), min(511, int(float(r['x'])/2))])
    assert len(masks) == 252 and len(inside) == 97
    assert sum(inside) >= 96  # mdb212's coordinates lie in the air

@needs_shared
def test_quarter_size_exams():
    "The ten lesions and the eight nipples of the two real exams at quarter size"
    folder = SHARED/'cbis_ddsm_2cases'
    with open(folder/'lesion_boxes_quarter.csv', newline='') as f: boxes = list(csv.DictReader(f))
    done = {}
    for b in boxes:
        if b['id'] not in done: done[b['id']] = prepare(read_stored(folder/'dicom_quarter'/f'Mass-Test_{b["id"]}.dcm'), b['id'].split('_')[2][0])
        p, box = done[b['id']], np.array([float(b[k]) for k in ('minx', 'miny', 'maxx', 'maxy')])
        x0, y0, x1, y1 = box.astype(int)
        assert p.back_mask(p.mask)[y0:y1+1, x0:x1+1].mean() > .98, b['id']
        assert np.abs(p.back_boxes(p.boxes([box]))[0]-box).max() < 1
    assert len(boxes) == 10 and len(done) == 8
    with open(folder/'nipple_points_by_eye.csv', newline='') as f: nipples = list(csv.DictReader(f))
    for n in nipples:  # picked by eye, +- 20 pixels at quarter size
        near = ndimage.binary_dilation(done[n['id']].back_mask(done[n['id']].mask), iterations=20)
        assert near[int(float(n['y_quarter'])), int(float(n['x_quarter']))], n['id']
    assert len(nipples) == 8
