"""Film borders: cut where a bright line runs along the whole edge of a scanned film, never where tissue is dense, never on a digital image."""
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from mammo_nb.dicom.mammogram import read_stored
from mammo_nb.dicom.write import write_mammogram
from mammo_nb.insilico.config import InSilicoConfig
from mammo_nb.insilico.images import render
from mammo_nb.preparation.breast_mask import breast_mask, coarse_image, find_film_border
from mammo_nb.preparation.prepare import PrepareConfig, plan, prepare

SHARED = Path(__file__).parents[2]/'shared'/'data'
NONE = (0, 0, 0, 0)

def texture(shape, seed, sigma=5):
    "Multiplicative texture exp(0.5 t), t smooth noise of unit variance"
    t = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma)
    return np.exp(.5*t/t.std())

def half_disc(rows=2000, cols=1000, height=.95, width=.8):
    "A smooth breast at the left edge"
    y, x = np.mgrid[:rows, :cols]
    return np.clip(1 - ((y-rows/2)/(height*rows/2))**2 - (x/(width*cols))**2, 0, None)**.5

def dense(seed, **shape):
    "A half disc of dense texture in [0,1]"
    pixels = half_disc(**shape)
    pixels *= texture(pixels.shape, seed)
    return pixels/pixels.max()

# ---- dense tissue is no border

@pytest.mark.parametrize('seed', range(8))
def test_dense_texture_keeps_its_columns(seed):
    "Before, four of these eight lost 25 to 30 columns at the chest wall"
    planned = plan(dense(seed), 'L')
    assert planned.film_border == NONE
    assert planned.window[0] == 0
    assert not any('border' in note for note in planned.notes)

def insilico_breasts():
    "Full-field in-silico breasts of 1536 x 1152, and one that all four edges of the film cut"
    config = InSilicoConfig(seed=1)
    images = [render(config, 0, 0, 'L', view) for view in ('CC', 'MLO')]
    images = [ndimage.zoom(image.astype(np.float32), 4, order=1) for image in images]
    return [*images, 1e3*half_disc(1536, 1152, height=1.6, width=1.7).astype(np.float32)]

def textured_edges(image, seed, sigma, lines=40):
    "The image with dense texture in its outer lines, the only ones that are looked at"
    image = image.copy()
    for i, edge in enumerate((image, image[::-1], image.T, image.T[::-1])):
        edge[:lines] *= texture((lines, edge.shape[1]), (seed, i), sigma)
    return image

def test_full_field_images_lose_nothing_in_100_seeds():
    breasts = [(image, *coarse_image(image)) for image in insilico_breasts()]
    breasts = [(image, breast_mask(coarse), k) for image, coarse, k in breasts]
    cut = {}
    for seed in range(100):
        image, mask, k = breasts[seed % 3]
        border = find_film_border(textured_edges(image, seed, (3, 5, 10, 5)[seed % 4]), mask, k)
        if border != NONE:
            cut[seed] = border
    assert not cut

@pytest.mark.parametrize('touching', [40, 100, 400])
def test_a_short_edge_of_dense_texture(touching):
    "A breast that touches an edge only shortly: a few blobs of texture are no line"
    mask = np.zeros((333, 166), bool)
    mask[:60, 20:20+touching//6] = True
    pixels = np.zeros((2000, 1000), np.float32)
    for seed in range(30):
        pixels[:64] = texture((64, 1000), seed, (3, 8, 15)[seed % 3])
        assert find_film_border(pixels, mask, 6)[0] == 0

# ---- real borders go

def bordered(depth=9, value=1., tilt=0):
    "A dense breast with a bright line along the chest wall"
    pixels = dense(1)
    pixels = .6*np.clip(pixels/np.quantile(pixels, .99), 0, 1)
    ends = depth + np.round(tilt*np.arange(len(pixels))/len(pixels))
    pixels[np.arange(pixels.shape[1]) < ends[:, None]] = value
    return pixels

@pytest.mark.parametrize('depth', [3, 9, 25])
def test_a_line_on_dense_texture_goes(depth):
    planned = plan(bordered(depth), 'L')
    assert planned.film_border == (0, 0, depth, 0)
    assert planned.notes[-1] == f'film border left out: {depth} pixels at the left'

@pytest.mark.parametrize('tilt', [-8, -4, 4, 8])
def test_a_tilted_line_goes(tilt):
    left = plan(bordered(12, tilt=tilt), 'L').film_border[2]
    thickest = 12 + max(tilt, 0)
    assert thickest-2 <= left <= thickest+4

@pytest.mark.skipif(not SHARED.exists(), reason='shared/data is not here')
def test_borders_of_mini_mias():
    "Of the eight originals one has a border that can be measured at this size"
    found = {}
    for path in sorted((SHARED/'mini_mias_dev'/'pgm1024').glob('*.pgm')):
        pixels = np.asarray(Image.open(path))
        coarse, k = coarse_image(pixels)
        found[path.stem] = find_film_border(pixels, breast_mask(coarse), k)
    assert len(found) == 8
    assert {name for name, border in found.items() if border != NONE} <= {'mdb002'}

# ---- digital images have none

FILMS = [dict(DetectorType='FILM'), dict(ConversionType='DF'), dict(NominalScannedPixelSpacing=[.1, .1])]

def bordered_file(path, **extra):
    pixels = np.round(4095*bordered()).astype(np.uint16)
    return read_stored(write_mammogram(path, pixels, 'L', 'CC', pixel_spacing_mm=.1, extra=extra))

def test_a_digital_image_is_never_cut(tmp_path):
    for detector in ({}, dict(DetectorType='DIRECT')):
        planned = plan(bordered_file(tmp_path/'a.dcm', **detector), 'L')
        assert planned.film_border == NONE
        assert not any('border' in note for note in planned.notes)

@pytest.mark.parametrize('extra', FILMS, ids=lambda e: next(iter(e)))
def test_a_digitized_film_is_cut_and_says_so(tmp_path, extra):
    image = bordered_file(tmp_path/'a.dcm', **extra)
    p = prepare(image, 'L', PrepareConfig(size=(400, 300)))
    assert 'film border left out: 9 pixels, 0.9 mm at the left' in p.notes
    assert p.affine.matrix[0, 2] < 0
