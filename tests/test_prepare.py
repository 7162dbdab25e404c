"""Preparing: pixels and map agree, the plain route is matched, masks hold on real film, wrong input is refused."""
import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage.draw import polygon2mask
from skimage.transform import resize
from mammo_nb.core.errors import InputError
from mammo_nb.core.geometry import mask_box
from mammo_nb.dicom.write import write_mammogram
from mammo_nb.dicom.mammogram import read_stored
from mammo_nb.cohort.datasets.two_exams import two_exams
from mammo_nb.insilico.files import insilico_cohort, write_insilico
from mammo_nb.insilico.config import parse_settings
from mammo_nb.insilico.ground_truth import truth
from mammo_nb.preparation.breast_mask import (
    breast_mask, chest_wall_side, coarse_image, find_film_border
)
from mammo_nb.preparation.prepare import PrepareConfig, plan, prepare
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.preparation.resampling import block_mean, sample_matrix
from mammo_nb.preparation.skin_line import fill_outline

SHARED = Path(__file__).parents[2]/'shared'/'data'
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason='shared/data is not here')

def breast(rows=900, cols=700, side='L', dots=()):
    "A smooth drawn breast with small bright dots at (row, col), for a left breast"
    y, x = np.mgrid[:rows, :cols] + .5
    pixels = 2500*np.clip(1 - (x/(.7*cols))**2 - ((y-.5*rows)/(.42*rows))**2, 0, None)**.4
    for row, col in dots:
        pixels += 1400*np.exp(-((y-row)**2 + (x-col)**2)/(2*6**2))
    pixels = pixels.astype(np.uint16)
    return pixels if side == 'L' else pixels[:, ::-1].copy()

@pytest.fixture(scope='module')
def films():
    "The eight real films, by patient and view"
    exams = two_exams()
    return {f'{r.patient_id} {r.laterality}-{r.view}': read_stored(exams.file(r.image_id)) for r in exams.images.itertuples()}

CONFIGS = [PrepareConfig(), PrepareConfig(crop=False), PrepareConfig(size=(100, 128)), PrepareConfig(size=(1200, 1000)),
           PrepareConfig(size=(1200, 1000), enlarge=True), PrepareConfig(margin=.2), PrepareConfig(size=(640, 640), spacing_mm=.21)]

# ---- the map

@pytest.mark.parametrize('config', CONFIGS, ids=lambda c: c.text)
@pytest.mark.parametrize('side', 'LR')
def test_pixels_and_map_agree(tmp_path, side, config):
    "A bright dot is found where the map sends it, to a tenth of a prepared pixel, and comes back"
    dots = np.array([(300.5, 200.), (450., 60.5), (600., 300.)])
    stored_dots = dots if side == 'L' else np.stack([dots[:, 0], 700-dots[:, 1]], 1)
    with_dots = read_stored(write_mammogram(tmp_path/'a.dcm', breast(side=side, dots=dots), side, 'CC', pixel_spacing_mm=.1))
    without = read_stored(write_mammogram(tmp_path/'b.dcm', breast(side=side), side, 'CC', pixel_spacing_mm=.1))
    p, q = prepare(with_dots, side, config), prepare(without, side, config)
    assert p.affine == q.affine
    assert p.mirrored == (side == 'R')
    bump = (p.image - q.image)[0]
    reach = int(np.ceil(24*p.scale))
    for place in p.points(stored_dots):
        top, left = (max(0, int(v)-reach) for v in place)
        bottom, right = (int(v)+reach+1 for v in place)
        found = np.array(ndimage.center_of_mass(bump[top:bottom, left:right])) + [top+.5, left+.5]
        assert np.abs(found-place).max() < max(.1, .15*p.scale)
    assert np.abs(p.inverse_points(p.points(stored_dots)) - stored_dots).max() < 1e-6

@pytest.mark.parametrize('config', CONFIGS, ids=lambda c: c.text)
@pytest.mark.parametrize('side', 'LR')
def test_coordinates_come_through(side, config):
    "An image whose values are its own coordinates: every prepared pixel shows where it came from"
    pixels = breast(side=side)
    config = config if config.spacing_mm is None else PrepareConfig(size=(640, 640))
    p = prepare(pixels, side, config)
    y, x = np.mgrid[:pixels.shape[0], :pixels.shape[1]] + .5
    rows, cols = np.nonzero(p.mask)
    places = p.inverse_points(np.stack([rows+.5, cols+.5], 1))
    factor = 1/p.scale
    deep = ((places > 3*factor) & (places < np.array(pixels.shape)-3*factor)).all(1) # reflection bends a ramp at the border
    assert deep.sum() > .5*len(deep)
    found = np.stack([p.transform_image(y)[rows, cols], p.transform_image(x)[rows, cols]], 1)
    assert np.abs(found-places)[deep].max() < .02*factor

def test_a_mask_lands_where_its_box_lands(films):
    exams = two_exams()
    names = {r.image_id: f'{r.patient_id} {r.laterality}-{r.view}' for r in exams.images.itertuples()}
    for lesion in exams.findings.itertuples():
        stored = films[names[lesion.image_id]]
        p = prepare(stored)
        box = np.array([lesion.xmin, lesion.ymin, lesion.xmax, lesion.ymax], float)
        x0, y0, x1, y1 = box.astype(int)
        filled = np.zeros(stored.pixels.shape, np.uint8)
        filled[y0:y1, x0:x1] = 1
        assert np.abs(mask_box(p.transform_mask(filled)) - p.boxes([box])[0]).max() <= 1

# ---- the pixels

@pytest.mark.parametrize('shape,size', [((900, 700), (384, 288)), ((2200, 1500), (300, 300)), ((2200, 1500), (640, 480)), ((500, 400), (384, 288))])
@pytest.mark.parametrize('side', 'LR')
def test_matches_the_plain_route(shape, size, side):
    "Within 1 % of skimage's anti-aliased resize of the same window, on textured images"
    rng = np.random.default_rng(1)
    texture = 1 + .15*np.clip(ndimage.gaussian_filter(rng.standard_normal(shape), 2)*6, -2, 2)
    pixels = (breast(*shape, side)*texture).astype(np.uint16)
    config = PrepareConfig(size=size)
    p, planned = prepare(pixels, side, config), plan(pixels, side, config)
    x0, y0, x1, y1 = planned.window
    part = pixels[y0:y1, x0:x1].astype(np.float64)/65535
    reference = resize(part[:, ::-1] if planned.mirror else part, planned.shape, order=1, anti_aliasing=True)
    h, w = planned.shape
    mask = p.mask[:h, :w]
    assert np.abs(p.image[0, :h, :w]-reference)[mask].mean() < .01*reference[mask].mean()

def test_windows_cut_before_averaging(tmp_path):
    "A narrow window is not a line over the image: it must be applied before averaging"
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.standard_normal((900, 700)), 3)
    pixels = np.where(breast() > 0, np.clip(2048 + 1000*noise/noise.std(), 1, 4095), 0).astype(np.uint16)
    path = write_mammogram(tmp_path/'a.dcm', pixels, 'L', 'CC', window=(2048, 200))
    stored, config = read_stored(path), PrepareConfig(size=(160, 120))
    p = prepare(stored, 'L', config)
    reference = p.transform_image(stored.to_unit(stored.pixels, 'voi_lut'))
    deep = ndimage.binary_erosion(p.mask, iterations=4) # away from the crop's border, where `transform_image` sees more
    assert np.abs(p.image[0]-reference)[deep].max() < 1e-3
    averaged_first = prepare(stored.pixels, 'L', config).image[0]*65535
    wrong = np.clip((averaged_first-1948)/199, 0, 1)
    assert np.abs(wrong-reference)[deep].mean() > .02

def test_monochrome1_is_the_same_image(tmp_path):
    pixels = breast()
    negative = (4095-pixels).astype(np.uint16)
    a = prepare(read_stored(write_mammogram(tmp_path/'a.dcm', pixels, 'L', 'CC')), 'L')
    b = prepare(read_stored(write_mammogram(tmp_path/'b.dcm', negative, 'L', 'CC', photometric='MONOCHROME1')), 'L')
    assert (a.mask == b.mask).all()
    assert np.abs(a.image-b.image).max() < 1e-5

def test_digital_background_is_exactly_zero():
    "Also for a breast that touches three borders"
    pixels = breast(600, 300)
    pixels[:, :120] = np.maximum(pixels[:, :120], 1500)
    p = prepare(pixels, 'L')
    assert p.mask[:, 0].all()
    assert not p.image[0][~p.mask].any()

def test_nothing_is_enlarged_unless_asked():
    small = breast(300, 200)
    assert prepare(small, 'L').scale == 1
    assert prepare(small, 'L', PrepareConfig(enlarge=True)).scale > 1

def test_the_whole_film_without_a_crop():
    p = prepare(breast(1200, 800), 'L', PrepareConfig(crop=False))
    assert np.allclose(p.affine.matrix[:2], [[.32, 0, 0], [0, .32, 0]], atol=1e-6)

def test_real_films(films):
    for name, film in films.items():
        side = name.split()[1][0]
        p = prepare(film, side)
        assert p.image.shape == (1, 384, 288)
        assert p.image.dtype == np.float32
        assert p.image.min() >= 0
        assert .5 < p.image.max() <= 1
        assert not p.image[0][~p.mask].any()
        assert p.mirrored == (side == 'R')
        assert chest_wall_side(p.mask) == 'left'
        assert p.mask[:, 0].sum() > .25*384 # the chest wall is the first column

# ---- parts

def test_block_means_of_signed_integers():
    pixels = np.random.default_rng(0).integers(-999, 999, (37, 50)).astype(np.int16)
    assert np.isclose(block_mean(pixels, 5)[0, 0], pixels[:5, :5].mean(), atol=1e-2)

def test_the_sampling_matrix_is_a_gaussian_filter():
    found = sample_matrix(40, np.arange(40)+.5, 2.).toarray()
    expected = ndimage.gaussian_filter1d(np.eye(40), 2., axis=0, mode='reflect')
    assert np.allclose(found, expected, atol=1e-3)
    assert np.allclose(sample_matrix(7, np.linspace(-2, 9, 20), 1.3).sum(1), 1, atol=1e-5)

def test_a_coarse_image_is_too_coarse_for_a_film_border():
    bordered = np.tile(np.linspace(.8, .2, 600), (600, 1))
    bordered[:, :3] = 1
    assert find_film_border(bordered, bordered > 0, 1) == (0, 0, 0, 0)

def test_film_borders_of_real_films(films):
    "Five of the eight have one; the malignant lesion of P_00820 L-CC begins at column 5"
    found = {name: plan(film, name.split()[1][0]).film_border for name, film in films.items()}
    none = {name for name, border in found.items() if not any(border)}
    assert none == {'P_00173 L-CC', 'P_00173 R-CC', 'P_00173 L-MLO'}
    assert found['P_00820 L-CC'] == (0, 0, 2, 0)
    assert 36 <= found['P_00820 L-MLO'][0] <= 44
    assert 50 <= found['P_00820 R-MLO'][0] <= 58
    assert 6 <= found['P_00820 R-CC'][3] <= 16

# ---- wrong input

@pytest.mark.parametrize('size', [(4, 288), '384x288', None, (384,), (384, 288, 1), ('a', 'b')])
def test_wrong_sizes(size):
    with pytest.raises(InputError, match='PrepareConfig: size'):
        PrepareConfig(size=size)

@pytest.mark.parametrize('choice', [dict(intensity='raw'), dict(margin=-1), dict(margin=.6), dict(spacing_mm=0), dict(on_laterality_mismatch='ignore')], ids=str)
def test_wrong_choices(choice):
    with pytest.raises(InputError, match=next(iter(choice))):
        PrepareConfig(**choice)

@pytest.mark.parametrize('pixels', [np.full((300, 200), 9, np.uint16), np.zeros((300, 200), np.uint8), np.full((300, 200), np.nan)], ids=['constant', 'zero', 'nan'])
def test_images_without_a_breast(pixels):
    with pytest.raises(InputError):
        prepare(pixels, 'L', where='b.dcm')

WRONG = {
    'colour': (np.zeros((3, 40, 40), np.uint8), r'\[H,W\]'),
    'floats beyond 1': (breast().astype(float), r'floats in \[0,1\]'),
    'a mammogram of stored values': (SimpleNamespace(pixels=breast(), header={}), r'read_stored\(path\)')}

@pytest.mark.parametrize('what', WRONG)
def test_wrong_images(what):
    image, message = WRONG[what]
    with pytest.raises(InputError, match=message):
        prepare(image, 'L')

DISCS = [(355, 734, 104, 397, 281), (466, 735, 74, 237, 292), (674, 573, 523, 207, 203), (851, 870, 703, 404, 271)]  # rows, columns, centre, radius


@pytest.mark.parametrize('rows,cols,row,col,radius', DISCS)
def test_grey_levels_of_float_images_do_not_exceed_one(rows, cols, row, col, radius):
    "Weights that sum to 1 but for the last digit gave 1.0000002"
    y, x = np.mgrid[:rows, :cols]
    p = prepare((np.hypot(y-row, x-col) < radius).astype(np.float32), 'L')
    assert p.image.min() == 0 and .999 < p.image.max() <= 1


@pytest.mark.parametrize('shape', [(8, 1600), (6000, 8)])
@pytest.mark.parametrize('dtype', [np.float32, np.uint16])
def test_a_line_is_no_mammogram(shape, dtype):
    "It ended in an error about a mean of no rows"
    with pytest.raises(InputError, match=f'found an image of shape .{shape[0]}, {shape[1]}.'):
        prepare(np.random.default_rng(0).integers(0, 2, shape).astype(dtype), 'L')


def test_a_wrong_laterality():
    with pytest.raises(InputError, match='one of L, R'):
        prepare(breast(), 'left')

def test_a_spacing_that_the_file_does_not_have():
    with pytest.raises(InputError, match='pixel spacing'):
        prepare(breast(), 'L', PrepareConfig(spacing_mm=.3))

def test_no_laterality_and_no_side():
    both = np.full((200, 100), 200, np.uint8)
    both[:20] = 0
    both[-20:] = 0
    with pytest.raises(InputError, match='no side that the image shows'):
        prepare(both)
    assert 'taken from the laterality' in prepare(both, 'R').notes[0]

def test_dark_arrays_are_noted():
    bright = (breast()*16).astype(np.uint16)
    assert not any('bits are used' in note for note in prepare(bright, 'L').notes)
    assert any('bits are used' in note for note in prepare(bright//64, 'L').notes)

# ---- cohorts

def test_insilico_masks(tmp_path):
    "In-silico images, whose breast is known: the mask fits, lesions are in it, letters are not"
    cohort = write_insilico(insilico_cohort(2, seed=11, exams=1), tmp_path/'d', workers=1, progress=False)
    prepared = prepare_cohort(cohort, tmp_path/'c', workers=1, progress=False)
    settings = parse_settings(cohort.images.provenance[0])
    assert len(prepared) == len(cohort.images) == 8
    for row in cohort.images.itertuples():
        p = prepared.load(row.image_id)
        true = truth(settings, row.patient_index, row.exam_index, row.laterality, row.view)
        mask = p.inverse_mask(p.mask)
        assert (mask & true.breast).sum()/(mask | true.breast).sum() > .97
        assert p.scale == 1
        assert p.mirrored == (row.laterality == 'R')
        assert abs(p.spacing_mm-row.pixel_spacing_mm) < 1e-6
        assert all(mask[lesion].all() for lesion in true.masks.values())

@pytest.mark.parametrize('module', ['cache', 'prepared_cohort'])
def test_workers_start_light(module):
    heavy = '("torch", "fastai", "pandas", "matplotlib", "skimage.filters", "sklearn")'
    code = f'import sys, mammo_nb.preparation.{module}; print([m for m in {heavy} if m in sys.modules])'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.stdout.strip() == '[]'

# ---- more real films

def read_csv(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))

@needs_shared
def test_mini_mias():
    "252 films: every side right, the marked lesions inside the mask, the tags outside"
    folder = SHARED/'mini_mias_dev'
    masks, inside = {}, []
    for row in read_csv(folder/'labels.csv'):
        name = row['image']
        if name not in masks:
            p = prepare(np.asarray(Image.open(folder/'png512'/f'{name}.png')), row['side'], PrepareConfig(size=(512, 512)))
            assert p.mirrored == (row['side'] == 'R')
            assert .15 < p.mask.mean() < .95
            masks[name] = p.inverse_mask(p.mask)
        if row['x']:
            y, x = (min(511, int(float(row[k])/2)) for k in ('y_topleft_origin', 'x'))
            inside.append(masks[name][y, x])
    assert len(masks) == 252
    assert len(inside) == 97
    assert sum(inside) >= 96 # the coordinates of mdb212 lie in the air

@needs_shared
def test_quarter_size_exams():
    "The ten lesions and the eight nipples of the two real exams at quarter size"
    folder = SHARED/'cbis_ddsm_2cases'
    boxes, nipples = read_csv(folder/'lesion_boxes_quarter.csv'), read_csv(folder/'nipple_points_by_eye.csv')
    images = {name: read_stored(folder/'dicom_quarter'/f'Mass-Test_{name}.dcm') for name in {b['id'] for b in boxes}}
    done = {name: prepare(image, name.split('_')[2][0]) for name, image in images.items()}
    assert (len(boxes), len(nipples), len(done)) == (10, 8, 8)
    for b in boxes:
        p, box = done[b['id']], np.array([float(b[k]) for k in ('minx', 'miny', 'maxx', 'maxy')])
        x0, y0, x1, y1 = box.astype(int)
        assert p.inverse_mask(p.mask)[y0:y1+1, x0:x1+1].mean() > .98
        assert np.abs(p.inverse_boxes(p.boxes([box]))[0]-box).max() < 1
    for n in nipples: # picked by eye, +- 20 pixels at quarter size
        p = done[n['id']]
        near = ndimage.binary_dilation(p.inverse_mask(p.mask), iterations=20)
        assert near[int(float(n['y_quarter'])), int(float(n['x_quarter']))]


def test_outlines_are_filled_as_by_scikit_image():
    rng = np.random.default_rng(0)
    for n in (3, 5, 40, 900):
        for _ in range(20):
            places = rng.uniform(-20, 90, (n, 2))
            np.testing.assert_array_equal(fill_outline((70, 60), places), polygon2mask((70, 60), places))
