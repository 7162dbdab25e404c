"""Radiomics against NumPy, formulas and counts by hand; the cache, failures, processes, and no look at test patients or the other view."""
import importlib.util
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from mammo_nb.cohort.cohort import Cohort
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import rng_for
from mammo_nb.preparation import radiomics_cache
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.preparation.radiomics import RADIOMICS_NAMES, RadiomicsExtractor, lesion_region
from mammo_nb.preparation.radiomics_cache import RadiomicsCache
from mammo_nb.preparation.radiomics_cohort import extract_radiomics
from mammo_nb.preparation.radiomics_scaler import RadiomicsScaler, radiomics_conditions
from repo import ROOT

NAMES = list(RADIOMICS_NAMES)
needs_radiomics = pytest.mark.skipif(
    importlib.util.find_spec('radiomics') is None,
    reason='PyRadiomics is not installed (make radiomics; it needs a C compiler)')


def noise(shape=(60, 50), seed=0):
    return rng_for(seed, 'test_radiomics').random(shape)


def disc(shape=(60, 50), radius=18):
    y, x = np.mgrid[:shape[0], :shape[1]]
    return np.hypot(y-shape[0]/2, x-shape[1]/2) < radius


def measure(*args, bin_width=25, **kwargs):
    features = RadiomicsExtractor(bin_width)(*args, **dict(spacing_mm=1.) | kwargs)
    return features.rename(lambda name: name.removeprefix('original_'))


# ---- names

def test_names_are_those_that_were_published():
    "The number of each class, and the first and last name of each"
    kinds = pd.Series([name.split('_')[1] for name in NAMES])
    assert kinds.value_counts(sort=False).to_dict() == dict(
        shape2D=9, firstorder=18, glcm=24, glrlm=16, glszm=16, ngtdm=5, gldm=14)
    assert NAMES[0] == 'original_shape2D_Elongation'
    assert NAMES[9] == 'original_firstorder_10Percentile'
    assert NAMES[-1] == 'original_gldm_SmallDependenceLowGrayLevelEmphasis'
    assert len(set(NAMES)) == 102


@needs_radiomics
def test_names_are_those_of_pyradiomics():
    from radiomics import getFeatureClasses
    found = []
    for kind, feature_class in getFeatureClasses().items():
        if kind != 'shape':
            names = feature_class.getFeatureNames()
            found += [f'original_{kind}_{name}' for name, deprecated in names.items() if not deprecated]
    assert sorted(found) == sorted(NAMES)


# ---- against other computations

@needs_radiomics
def test_first_order_is_that_of_numpy_and_scipy():
    image, mask = noise(), disc()
    f, v = measure(image, mask), 255*noise()[disc()]
    inner = v[(v >= np.percentile(v, 10)) & (v <= np.percentile(v, 90))]
    low = np.floor(v.min()/25)*25
    p = np.unique(((v-low)//25), return_counts=True)[1]/len(v)
    expected = dict(
        Mean=v.mean(), Median=np.median(v), Minimum=v.min(), Maximum=v.max(), Range=np.ptp(v),
        Variance=v.var(), Skewness=stats.skew(v), Kurtosis=stats.kurtosis(v, fisher=False),
        Energy=(v**2).sum(), TotalEnergy=(v**2).sum(), RootMeanSquared=np.sqrt((v**2).mean()),
        InterquartileRange=stats.iqr(v), MeanAbsoluteDeviation=abs(v-v.mean()).mean(),
        RobustMeanAbsoluteDeviation=abs(inner-inner.mean()).mean(),
        Entropy=stats.entropy(p, base=2), Uniformity=(p**2).sum(),
        **{'10Percentile': np.percentile(v, 10), '90Percentile': np.percentile(v, 90)})
    assert len(expected) == 18
    for name, value in expected.items():
        assert f[f'firstorder_{name}'] == pytest.approx(value, rel=1e-9), name


@needs_radiomics
@pytest.mark.parametrize('mm', [.1, 1., 2.5])
def test_shape_of_a_disc(mm):
    radius = 60
    f = measure(noise((140, 140)), disc((140, 140), radius), spacing_mm=mm)
    assert f['shape2D_PixelSurface'] == pytest.approx(np.pi*(radius*mm)**2, rel=.01)
    assert f['shape2D_MeshSurface'] == pytest.approx(np.pi*(radius*mm)**2, rel=.01)
    assert f['shape2D_Perimeter'] == pytest.approx(2*np.pi*radius*mm, rel=.06)
    assert f['shape2D_MaximumDiameter'] == pytest.approx(2*radius*mm, rel=.02)
    assert f['shape2D_MajorAxisLength'] == pytest.approx(2*radius*mm, rel=.01)
    assert f['shape2D_Elongation'] == pytest.approx(1, abs=.01)
    assert .93 < f['shape2D_Sphericity'] <= 1


@needs_radiomics
def test_shape_of_a_rectangle():
    "The axes are four standard deviations of evenly spread pixels"
    f = measure(noise(), box=(5, 10, 45, 30))
    assert f['shape2D_PixelSurface'] == 40*20
    sd = [np.sqrt((n*n-1)/12) for n in (40, 20)]
    assert f['shape2D_MajorAxisLength'] == pytest.approx(4*sd[0])
    assert f['shape2D_MinorAxisLength'] == pytest.approx(4*sd[1])
    assert f['shape2D_Elongation'] == pytest.approx(sd[1]/sd[0])


def glcm_by_hand(levels):
    "Mean over four directions of the contrast of symmetrical, normalised matrices"
    contrasts = []
    rows, cols = levels.shape
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        pairs = [(levels[y, x], levels[y+dy, x+dx]) for y in range(rows) for x in range(cols)
                 if 0 <= y+dy < rows and 0 <= x+dx < cols]
        contrasts.append(np.mean([(a-b)**2 for a, b in pairs]))
    return np.mean(contrasts)


@needs_radiomics
def test_glcm_contrast_by_hand():
    levels = np.array([[1, 2, 3, 1], [2, 2, 1, 3], [3, 1, 1, 2]])
    image = np.zeros((8, 9), np.uint8)
    image[2:5, 3:7] = 25*levels + 5
    f = measure(image, box=(3, 2, 7, 5))
    assert f['glcm_Contrast'] == pytest.approx(glcm_by_hand(levels))


@needs_radiomics
def test_zones_by_hand():
    "Two zones of 6 and one of 4 pixels; long zones do not overflow"
    levels = np.repeat([[1, 1, 1, 2, 2, 3, 3, 3]], 2, 0)
    f = measure((25*levels+5).astype(np.uint8), np.ones((2, 8)))
    areas, grey = np.array([6, 4, 6]), np.array([1, 2, 3])
    assert f['glszm_LargeAreaEmphasis'] == pytest.approx((areas**2.).mean())
    assert f['glszm_LargeAreaHighGrayLevelEmphasis'] == pytest.approx((areas**2.*grey**2).mean())
    assert f['glszm_ZonePercentage'] == pytest.approx(3/16)


@needs_radiomics
def test_large_zones_do_not_overflow():
    "Zones of 500,000 pixels: their squares and fourth powers exceed 32 bits"
    image = np.full((1000, 1000), 30, np.uint8)
    image[:, 500:] = 230
    f = measure(image, np.ones(image.shape))
    area = 500_000
    assert f['glszm_LargeAreaEmphasis'] == pytest.approx(float(area)**2)
    assert f['glszm_LargeAreaHighGrayLevelEmphasis'] == pytest.approx(area**2*(1+81)/2)
    assert f['firstorder_Energy'] == pytest.approx(area*(30.**2+230.**2))
    assert f['gldm_LargeDependenceEmphasis'] > 0
    assert np.isfinite(f).all() and (f.drop(['glcm_Imc1', 'glcm_ClusterShade', 'firstorder_Skewness']) > -1e-9).all()


@needs_radiomics
def test_bins_of_eight_bits_do_not_overflow(recwarn):
    "PyRadiomics adds two bins to the largest of 8-bit values; 255 + 50 is no 8-bit value"
    grey = (255*noise()).astype(np.uint8)
    grey[30, 24:26] = 0, 255
    f = measure(grey, disc())
    assert f['firstorder_Range'] == 255 and not [w for w in recwarn if 'overflow' in str(w.message)]
    low = grey[disc()].astype(float)//25
    p = np.unique(low, return_counts=True)[1]/disc().sum()
    assert f['firstorder_Entropy'] == pytest.approx(stats.entropy(p, base=2))


@needs_radiomics
def test_the_crop_changes_nothing():
    "PyRadiomics on the whole image gives the same numbers"
    import SimpleITK as sitk
    from radiomics.featureextractor import RadiomicsFeatureExtractor
    image, mask = noise(), disc(radius=11)
    plain = RadiomicsFeatureExtractor(binWidth=25)
    images = [sitk.GetImageFromArray(a) for a in (255*image, mask.astype(np.uint8))]
    for i in images:
        i.SetSpacing((.3, .3))
    plain.disableAllFeatures()
    for kind in ('shape2D', 'firstorder', 'glcm', 'glrlm', 'glszm', 'ngtdm', 'gldm'):
        plain.enableFeatureClassByName(kind)
    found = plain.execute(*images)
    ours = RadiomicsExtractor()(image, mask, spacing_mm=.3)
    np.testing.assert_allclose(ours, [float(found[name]) for name in NAMES], rtol=1e-9, atol=1e-12)


@needs_radiomics
def test_eight_and_sixteen_bits_and_floats_are_one_scale():
    grey = (255*noise()).astype(np.uint8)
    expected = measure(grey, disc())
    np.testing.assert_allclose(measure(grey.astype(np.uint16)*257, disc()), expected, rtol=1e-9)
    np.testing.assert_allclose(measure(grey/255, disc()), expected, rtol=1e-9)
    np.testing.assert_allclose(measure(grey[None], disc()), expected, rtol=1e-9)


# ---- lesions that cannot be measured

@pytest.mark.parametrize('change, what', [
    (dict(mask=np.zeros((60, 50))), 'lesion'), (dict(mask=disc(radius=1)), 'lesion'),
    (dict(mask=np.eye(60, 50) * (np.arange(60)[:, None] == 3)), 'lesion'),
    (dict(image=np.full((60, 50), .5)), 'grey levels of the lesion'), (dict(mask=disc((50, 60))), 'mask'),
    (dict(image=noise()*300), 'image'), (dict(image=np.where(disc(), np.nan, .5)), 'image'),
    (dict(image=noise().astype(np.int32)), 'image'), (dict(image=noise((2, 60, 50))), 'image'),
    (dict(spacing_mm=None), 'spacing_mm'), (dict(spacing_mm=0), 'spacing_mm'),
    (dict(mask=None, box=(1, 2, 3, np.nan)), 'box'), (dict(mask=None, box=(40, 2, 55, 30)), 'box'),
    (dict(mask=None, box=(9, 2, 9, 30)), 'box'), (dict(mask=None, box=(1, 2, 3)), 'box'),
    (dict(box=(1, 2, 9, 9)), 'mask and box'), (dict(mask=None), 'mask and box')])
def test_what_cannot_be_measured_is_refused(change, what):
    arguments = dict(image=noise(), mask=disc(), spacing_mm=.5) | change
    with pytest.raises(InputError) as e:
        lesion_region(**arguments)
    assert e.value.what == what


@needs_radiomics
def test_agreed_numbers_are_unknown():
    "In one bin PyRadiomics gives a correlation of 1 and a coarseness of a million"
    f = measure((.5 + noise()/100), disc())
    assert f.index[f.isna()].tolist() == ['glcm_Correlation', 'glcm_Imc1', 'glcm_Imc2', 'glcm_MCC', 'ngtdm_Coarseness']
    assert measure(noise(), disc()).notna().all()


# ---- a cohort

@pytest.fixture
def cohort(tmp_path):
    "Twelve images with a lesion each (the last a single pixel), six patients"
    y, x = np.mgrid[:160, :120] + .5
    breast = np.clip(1 - (x/100)**2 - ((y-80)/75)**2, 0, None)**.5
    images, findings = [], []
    for k in range(12):
        patient, view = f'p{k//2}', ('CC', 'MLO')[k % 2]
        name = f'{patient}-{view}'
        pixels = (breast > 0)*(120*breast + 80*rng_for(k, 'cohort').random(breast.shape))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path/f'{name}.png')
        images.append(dict(
            image_id=name, patient_id=patient, exam_id=f'e{k//2}', laterality='L', view=view,
            path=f'{name}.png', pixel_spacing_mm=.5, split='train' if k < 8 else 'test'))
        size = 20 if k < 11 else .1
        findings.append(dict(
            finding_id=f'f{k}', image_id=name, pathology=('benign', 'malignant')[k//2 % 2],
            xmin=20.2+k, ymin=60.2, xmax=20.2+k+size, ymax=60.2+size))
    return Cohort(pd.DataFrame(images), pd.DataFrame(findings), tmp_path)


def prepare(cohort):
    return prepare_cohort(cohort, cohort.root/'cache', size=(160, 120), workers=1, progress=False)


def extract(lesions, **kwargs):
    return extract_radiomics(lesions, **dict(workers=1, progress=False) | kwargs)


@needs_radiomics
def test_two_processes_give_the_bits_of_one(cohort):
    prepared = prepare(cohort)
    one = extract(prepared, folder=cohort.root/'one')
    two = extract(prepared, folder=cohort.root/'two', workers=2)
    pd.testing.assert_frame_equal(one.lesions, two.lesions, check_exact=True)
    pd.testing.assert_frame_equal(one.failures, two.failures)
    assert (two.n_extracted, two.n_cached) == (11, 0)
    assert one.lesions.finding_id.tolist() == [f'f{k}' for k in range(11)]


@needs_radiomics
def test_failures_are_listed(cohort):
    table = extract(prepare(cohort))
    assert table.failures.to_dict('records') == [dict(
        finding_id='f11', image_id='p5-MLO', patient_id='p5', exam_id='e5', laterality='L', view='MLO', split='test',
        what='lesion', found='1 x 1 pixels', expected='at least 2 rows and 2 columns')]
    image = table.by_image().set_index('image_id').loc['p5-MLO']
    assert image.n_lesions == 0 and image.n_failed == 1 and image.patient_id == 'p5'


@needs_radiomics
def test_a_missing_mask_and_a_damaged_image_are_failures(cohort):
    files = cohort.findings.assign(spacing_mm=.5)
    files['image_path'] = [str(cohort.root/f'{i}.png') for i in files.image_id]
    files['mask_path'] = None
    files.loc[0, 'mask_path'] = str(cohort.root/'none.png')
    (cohort.root/'p1-CC.png').write_bytes(b'no image')
    failures = extract(files).failures.set_index('finding_id')
    assert failures.what.to_dict() == dict(f0='file', f2='image', f11='lesion')
    assert str(cohort.root) not in failures.to_csv().replace(str(cohort.root/'p1-CC.png'), '')


@needs_radiomics
def test_a_full_disk_is_no_fault_of_a_lesion(cohort, monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(radiomics_cache, 'atomic_write', full)
    with pytest.raises(OSError, match='No space'):
        extract(prepare(cohort))


@needs_radiomics
def test_unknown_spacing_is_a_failure_or_given(cohort):
    bare = cohort.with_tables(cohort.images.drop(columns='pixel_spacing_mm'))
    prepared = prepare(bare)
    assert set(extract(prepared).failures.what) == {'spacing_mm'}
    given = extract(prepared, spacing_mm=.5)
    np.testing.assert_array_equal(given.lesions[NAMES], extract(prepare(cohort)).lesions[NAMES])


def test_two_lesions_of_one_name_are_refused(cohort):
    files = pd.concat([cohort.findings]*2).assign(image_path='a.png')
    with pytest.raises(InputError, match='f0 twice'):
        extract(files)


# ---- the cache

@needs_radiomics
def test_what_changes_the_features_is_measured_again(cohort):
    prepared = prepare(cohort)
    extract(prepared)
    assert extract(prepared).n_extracted == 0
    assert extract(prepared, extractor=RadiomicsExtractor(10)).n_cached == 0
    path = cohort.root/'p0-CC.png'
    pixels = np.array(Image.open(path))
    pixels[70, 30] ^= 128
    Image.fromarray(pixels).save(path)
    again = extract(prepare(cohort))
    assert (again.n_extracted, again.n_cached) == (1, 10)


@needs_radiomics
def test_a_moved_box_is_measured_again(cohort):
    extract(prepare(cohort))
    findings = cohort.findings.copy()
    findings.loc[2, 'xmax'] += 3
    again = extract(prepare(cohort.with_tables(findings=findings)))
    assert (again.n_extracted, again.n_cached) == (1, 10)


@needs_radiomics
def test_other_code_or_libraries_are_other_entries(monkeypatch):
    region, cache = lesion_region(noise(), disc(), spacing_mm=1), RadiomicsCache('x')
    before = cache.key(region, RadiomicsExtractor())
    monkeypatch.setattr(radiomics_cache, '_CODE', radiomics_cache._CODE.replace('numpy=', 'numpy=9'))
    assert cache.key(region, RadiomicsExtractor()) != before


@needs_radiomics
@pytest.mark.parametrize('damage', ['cut', 'bit', 'empty', 'other', 'binary'])
def test_damaged_entries_are_measured_again(cohort, damage):
    prepared = prepare(cohort)
    first = extract(prepared)
    entries = sorted((prepared.cache.folder/'radiomics').rglob('*.json'))
    assert len(entries) == 11
    data = entries[0].read_bytes()
    changed = dict(cut=data[:-90], bit=data.replace(b'1', b'2', 1), empty=b'', other=entries[1].read_bytes(), binary=b'\xff\xfe')
    entries[0].write_bytes(changed[damage])
    again = extract(prepared)
    assert again.n_extracted == 1
    pd.testing.assert_frame_equal(first.lesions, again.lesions, check_exact=True)
    assert extract(prepared).n_extracted == 0


# ---- the scaler and the condition

def image_table(n=24, seed=0):
    rng = rng_for(seed, 'image_table')
    rows = [dict(image_id=f'p{i}-{view}', patient_id=f'p{i}', view=view, split=('train', 'valid', 'test')[i % 3])
            for i in range(n) for view in ('CC', 'MLO')]
    features = pd.DataFrame(rng.lognormal(0, 1, (len(rows), 102)), columns=NAMES)
    return pd.concat([pd.DataFrame(rows), features], axis=1)


def test_the_scaler_is_that_of_scikit_learn_on_training_patients():
    from sklearn.preprocessing import StandardScaler
    images = image_table()
    train = images[images.split == 'train']
    rival = StandardScaler().fit(train[NAMES])
    z = RadiomicsScaler.fit(images).transform(images)
    np.testing.assert_allclose(z, rival.transform(images[NAMES]).clip(-5, 5), atol=1e-5)


def test_other_patients_have_no_part_in_the_scaler():
    images = image_table()
    scaler = RadiomicsScaler.fit(images)
    for split in ('valid', 'test'):
        moved = images.copy()
        moved.loc[moved.split == split, NAMES] = 1e9
        other = RadiomicsScaler.fit(moved)
        np.testing.assert_array_equal(other.mean, scaler.mean)
        np.testing.assert_array_equal(other.std, scaler.std)
    moved = images.copy()
    moved.loc[0, NAMES] = 1e9
    assert (RadiomicsScaler.fit(moved).mean != scaler.mean).all()


@pytest.mark.parametrize('change, what', [
    (lambda t: t.drop(columns='split'), 'split'), (lambda t: t.drop(columns='patient_id'), 'patient_id'),
    (lambda t: t.assign(split=t.split.where(t.index > 3)), 'split'), (lambda t: t[t.split == 'test'], 'split'),
    (lambda t: t.assign(split=['train', 'test']*24), 'split'), (lambda t: t.drop(columns=NAMES[7]), 'features')])
def test_the_scaler_refuses(change, what):
    with pytest.raises(InputError) as e:
        RadiomicsScaler.fit(change(image_table()))
    assert e.value.what == what


def test_scaled_numbers_are_finite_and_limited():
    images = image_table()
    images.loc[:, NAMES[1]] = 3.
    images.loc[:, NAMES[2]] = np.nan
    images.loc[5, NAMES[4]] = np.nan
    images.loc[6, NAMES[4]] = np.inf
    images.loc[7, NAMES[4]] = 1e12
    scaler = RadiomicsScaler.fit(images)
    z = scaler.transform(images)
    assert np.isfinite(z).all() and abs(z).max() == 5 and z.dtype == np.float32
    assert not z[:, 1].any() and not z[:, 2].any() and z[5, 4] == 0
    again = RadiomicsScaler.from_config(json.loads(json.dumps(scaler.config)))
    np.testing.assert_array_equal(again.transform(images), z)


def test_scalers_of_other_features_are_refused():
    config = RadiomicsScaler.fit(image_table()).config
    with pytest.raises(InputError, match='names'):
        RadiomicsScaler.from_config(config | dict(names=config['names'][::-1]))
    with pytest.raises(InputError, match='mean and std'):
        RadiomicsScaler(config['mean'][:5], config['std'])


def test_the_condition_sees_no_mlo_image():
    "Neither the MLO side of the pairs nor the features of MLO images change a bit"
    images = image_table()
    scaler = RadiomicsScaler.fit(images)
    pairs = pd.DataFrame(dict(image_id_cc=[f'p{i}-CC' for i in range(24)], image_id_mlo=[f'p{i}-MLO' for i in range(24)]))
    r = radiomics_conditions(pairs, images, scaler)
    permuted = pairs.assign(image_id_mlo=pairs.image_id_mlo.to_numpy()[::-1])
    np.testing.assert_array_equal(radiomics_conditions(permuted, images, scaler), r)
    np.testing.assert_array_equal(radiomics_conditions(pairs[['image_id_cc']], images, scaler), r)
    moved = images.copy()
    moved.loc[moved.view == 'MLO', NAMES] = 1e6
    np.testing.assert_array_equal(radiomics_conditions(pairs, moved, scaler), r)
    leaky = [radiomics_conditions(p, images, scaler, ('cc', 'mlo')) for p in (pairs, permuted)]
    assert (leaky[0] != leaky[1]).any(1).all()


def test_a_breast_without_a_lesion_or_cc_image_has_zeros():
    images = image_table()
    pairs = pd.DataFrame(dict(image_id_cc=['p0-CC', 'unknown', None]))
    r = radiomics_conditions(pairs, images, RadiomicsScaler.fit(images))
    assert r[0].any() and not r[1:].any()


# ---- plots

def test_effect_sizes_are_hedges_g_of_patients():
    "Against Cohen's d by hand, one value a patient and group"
    from mammo_nb.preparation.radiomics_plots import effect_sizes
    lesions = image_table().assign(pathology=['malignant', 'malignant', 'benign', 'benign']*12)
    name = NAMES[20]
    means = lesions.groupby(['pathology', 'patient_id'])[name].mean()
    a, b = means['malignant'], means['benign']
    pooled = np.sqrt((a.var()+b.var())/2)
    expected = (a.mean()-b.mean())/pooled*(1-3/(4*24-9))
    effects = effect_sizes(lesions)
    assert effects.loc[name, 'g'] == pytest.approx(expected)
    assert effects.loc[name, 'low'] < expected < effects.loc[name, 'high']
    doubled = pd.concat([lesions, lesions])
    pd.testing.assert_frame_equal(effect_sizes(doubled), effects)


def test_clusters_follow_correlation_not_scale():
    from mammo_nb.preparation.radiomics_plots import feature_clusters
    lesions = image_table(60)
    lesions[NAMES[1]] = -lesions[NAMES[0]]**3
    lesions[NAMES[2]] = 4.
    clusters = feature_clusters(lesions)
    assert clusters[NAMES[0]] == clusters[NAMES[1]] == 1
    assert NAMES[2] not in clusters and clusters.nunique() == 100


# ---- installation

@pytest.fixture
def installer():
    spec = importlib.util.spec_from_file_location('install_radiomics', ROOT/'.ci/install_radiomics.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('part, words', [('which', 'no C compiler was found'), ('header', 'headers of Python')])
def test_make_says_what_is_missing(installer, monkeypatch, capsys, part, words):
    monkeypatch.setattr(installer, 'is_installed', lambda: False)
    monkeypatch.setattr(installer.os, 'name', 'posix')
    monkeypatch.setattr(installer.shutil, 'which', (lambda name: None) if part == 'which' else (lambda name: name))
    monkeypatch.setattr(installer.sysconfig, 'get_path', lambda name: str(ROOT/'no_such_folder'))
    monkeypatch.setattr(installer, 'build', lambda: pytest.fail('built without a compiler'))
    assert installer.main() == 0
    said = capsys.readouterr().out
    assert words in said and 'make radiomics' in said and 'All else works' in said


def test_make_goes_on_where_the_build_fails(installer, monkeypatch, capsys):
    monkeypatch.setattr(installer, 'is_installed', lambda: False)
    monkeypatch.setattr(installer, 'what_is_missing', lambda: None)
    monkeypatch.setattr(installer, 'build', lambda: 'error: a broken header')
    assert installer.main() == 0
    said = capsys.readouterr().out
    assert 'a broken header' in said and 'the build failed' in said


def test_what_is_installed_is_not_built_again(installer, monkeypatch):
    monkeypatch.setattr(installer, 'is_installed', lambda: True)
    monkeypatch.setattr(installer, 'build', lambda: pytest.fail('built again'))
    assert installer.main() == 0
    assert installer.requirements() == ['pyradiomics-bhklab>=3.1.4']


def test_without_pyradiomics_the_error_tells_how_to_get_it(monkeypatch):
    from mammo_nb.preparation import radiomics
    monkeypatch.setitem(__import__('sys').modules, 'radiomics.featureextractor', None)
    with pytest.raises(ImportError, match='pip install pyradiomics-bhklab'):
        radiomics.import_pyradiomics()
