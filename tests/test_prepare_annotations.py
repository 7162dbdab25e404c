"""Annotations of prepared images, and maps that are drawn over them."""
import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.core.errors import InputError
from mammo_nb.preparation.annotations import (
    map_layer, prepared_findings, read_lesion_mask, read_nipple, show_prepared
)
from mammo_nb.preparation.prepared_cohort import prepare_cohort

matplotlib.use('Agg')
MASK = np.zeros((40, 30), bool)
MASK[5:35, :20] = True

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    "One right breast: a finding with a mask file, one with a box, one with neither; and an image without findings"
    folder = tmp_path_factory.mktemp('annotations')
    y, x = np.mgrid[:300, :240] + .5
    depth = np.clip(1 - ((240-x)/190)**2 - ((y-150)/130)**2, 0, None)**.5
    for name, brightness in (('cc', 200), ('mlo', 199)): # no two views have the same file
        Image.fromarray((brightness*depth).astype(np.uint8)).save(folder/f'{name}.png')
    Image.fromarray(np.hypot(y-120, x-150) < 14).save(folder/'disc.png')
    image = dict(patient_id='p', exam_id='e', laterality='R', pixel_spacing_mm=.5)
    images = pd.DataFrame([image | dict(image_id='cc', view='CC', path='cc.png', nipple_row=150., nipple_col=52.),
                           image | dict(image_id='mlo', view='MLO', path='mlo.png')])
    findings = pd.DataFrame([dict(finding_id='mask', image_id='cc', pathology='malignant', mask_path='disc.png'),
                             dict(finding_id='box', image_id='cc', pathology='benign', xmin=172., ymin=190., xmax=188., ymax=210.),
                             dict(finding_id='neither', image_id='mlo', pathology='malignant')])
    return prepare_cohort(Cohort(images, findings, folder), folder/'cache', size=(150, 110), workers=1, progress=False)

# ---- maps

@pytest.mark.parametrize('empty', [np.zeros((5, 4)), np.full((5, 4), np.nan), np.full((5, 4), -1.)], ids=['zero', 'unknown', 'negative'])
def test_an_empty_map_is_invisible(empty):
    "It was drawn as a bright even layer, which reads as 'looks everywhere'"
    assert map_layer(empty, MASK)[..., 3].max() == 0
    assert np.isfinite(map_layer(empty, MASK)).all()

@pytest.mark.parametrize('values', [np.ones((5, 4)), np.ones((40, 30))], ids=['coarse', 'fine'])
def test_a_map_does_not_paint_the_air(values):
    layer = map_layer(values, MASK, opacity=.6)
    assert not layer[~MASK, 3].any()
    assert np.allclose(layer[MASK, 3], .6)

def test_the_strongest_place_of_a_map_outside_the_breast_does_not_count():
    values = np.zeros((40, 30))
    values[0, 29] = 100
    values[20, 10] = 1
    layer = map_layer(values, MASK)
    assert layer[..., 3].argmax() == 20*30 + 10
    assert layer[20, 10, 3] == np.float32(.75)

def test_a_limit_makes_maps_comparable():
    values = np.full((40, 30), .5)
    assert np.isclose(map_layer(values, MASK, limit=1., opacity=1.)[20, 10, 3], .5)
    assert np.isclose(map_layer(values, MASK, limit=.1, opacity=1.)[20, 10, 3], 1)

def test_a_cell_lies_where_it_should():
    "The middle of a coarse cell is the middle of its pixels"
    values = np.zeros((4, 3))
    values[2, 1] = 1
    opacity = map_layer(values, np.ones((40, 30), bool))[..., 3]
    rows, cols = (np.arange(n) + .5 for n in opacity.shape)
    total = opacity.sum()
    assert np.isclose((rows*opacity.sum(1)).sum()/total, 25)
    assert np.isclose((cols*opacity.sum(0)).sum()/total, 15)

def test_a_map_with_channels_is_refused():
    with pytest.raises(InputError, match=r'a map \[h,w\]'):
        map_layer(np.zeros((1, 5, 4)), MASK)

def test_showing_an_image(prepared):
    ax = show_prepared(prepared, 'cc', np.ones((5, 4)), limit=2.)
    assert len(ax.images) == 2
    assert ax.texts[0].get_text().endswith(' mm')
    assert len(show_prepared(prepared, 'mlo').images) == 1
    plt.close('all')

# ---- annotations

def test_lesion_masks(prepared):
    malignant, all_findings = read_lesion_mask(prepared, 'cc'), read_lesion_mask(prepared, 'cc', None)
    assert malignant.sum() < all_findings.sum()
    assert all_findings[malignant].all()
    assert read_lesion_mask(prepared, 'mlo') is None
    assert read_lesion_mask(prepared, 'cc', 'unknown') is None

def test_a_box_covers_whole_pixels(prepared):
    benign = read_lesion_mask(prepared, 'cc', 'benign')
    x0, y0, x1, y1 = prepared.boxes('cc')[1]
    rows, cols = np.nonzero(benign)
    assert (rows.min(), rows.max()+1) == (np.floor(y0), np.ceil(y1))
    assert (cols.min(), cols.max()+1) == (np.floor(x0), np.ceil(x1))

def test_findings_without_a_box(prepared):
    assert prepared_findings(prepared, 'cc').xmin.isna().tolist() == [True, False]
    assert prepared_findings(prepared, 'mlo').xmin.isna().all()

def test_nipples(prepared):
    assert np.allclose(prepared.load('cc').inverse_points([read_nipple(prepared, 'cc')]), [(150, 52)])
    assert read_nipple(prepared, 'mlo') is None
    assert read_nipple(prepared, 'no such image') is None

@pytest.mark.parametrize('function', [prepared_findings, read_lesion_mask, read_nipple, show_prepared], ids=lambda f: f.__name__)
def test_a_cohort_that_is_not_prepared(prepared, function):
    with pytest.raises(InputError, match=r'prepare_cohort\(cohort, folder\)'):
        function(prepared.cohort, 'cc')
