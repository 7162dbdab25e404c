"Patches with a hole: nothing of the lesion may reach the inputs, and the attributes mean what they say."
import numpy as np
import pandas as pd
import pytest
import torch

from mammo_nb.cohort.cohort import Cohort
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import rng_for
from mammo_nb.core.vocabulary import KINDS
from mammo_nb.insilico.files import insilico_cohort, write_insilico
from mammo_nb.preparation.prepare import PrepareConfig
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.samples.augment import Augment
from mammo_nb.samples.dataset import ImageStore
from mammo_nb.samples.lesion_synthesis import (
    ATTRIBUTES, LesionAugment, LesionSynthesisDataset, cut_hole, cut_window, encode_attributes,
    grow_box, healthy_patches, hole_mask, lesion_dls, lesion_patches, paste_patch, place_box,
    place_window)
from mammo_nb.samples.lesion_patches import annotated_patches

CORNERS = ['xmin', 'ymin', 'xmax', 'ymax']
SMALL = dict(rows=192, cols=144, pixel_spacing_mm=1.25)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('lesions')
    cohort = insilico_cohort(16, seed=4, exams=1, **SMALL)
    return write_insilico(cohort, folder/'files', format='png', workers=1, progress=False)


def prepare(files, folder, size, **options):
    return prepare_cohort(files, folder/'cache', PrepareConfig(size=size, **options), workers=1,
                          progress=False)


@pytest.fixture(scope='module')
def prepared(files, tmp_path_factory):
    return prepare(files, tmp_path_factory.mktemp('prepared'), (192, 144))


@pytest.fixture(scope='module')
def rows(prepared):
    lesions = lesion_patches(prepared.cohort, KINDS)
    return pd.concat([lesions, healthy_patches(prepared, lesions)], ignore_index=True)


def with_other_lesions(dataset, value):
    "The same data set, with `value` or noise in the hole of every image"
    other = LesionSynthesisDataset(dataset.prepared, dataset.rows, **dataset.settings)
    store = ImageStore(dataset.prepared, dataset.ids.ravel(), in_memory=True)
    other.images = store
    generator = torch.Generator().manual_seed(0)
    original = dict(store.cache)
    def read(i):
        image = original[dataset.ids[i, 0]].clone()
        hole = hole_mask(dataset.place_of(i)[0], dataset.size, dataset.settings['margin'])
        noise = torch.rand(image.shape, generator=generator) if value is None else torch.full_like(image, value)
        store.cache[dataset.ids[i, 0]] = torch.where(hole, noise, image)
        return other[i]
    return read


WINDOWS = [
    dict(size=32, limits=(40, 160)), dict(size=64, limits=(20, 160)), dict(size=56, context=None),
    dict(size=48, fixed_mm=80.), dict(size=8, limits=(40, 160)), dict(size=104, limits=None, margin=0.)]


@pytest.mark.parametrize('options', WINDOWS, ids=str)
@pytest.mark.parametrize('value', [None, 0., 1.])
def test_no_pixel_of_the_hole_reaches_the_inputs(prepared, rows, options, value):
    ds = LesionSynthesisDataset(prepared, rows, **options)
    read = with_other_lesions(ds, value)
    changed = 0
    for i in range(0, len(ds), 3):
        (x, y), (other_x, other_y) = ds[i], read(i)
        for name in x: assert torch.equal(x[name].nan_to_num(9), other_x[name].nan_to_num(9)), name
        changed += not torch.equal(y['image'], other_y['image'])
        assert torch.equal(y['image'][~x['mask']], other_y['image'][~x['mask']])
    assert changed, 'the lesions were not changed: the test shows nothing'


def test_roi_mode_leaks(prepared, rows):
    ds = LesionSynthesisDataset(prepared, rows, size=32, limits=(40, 160), mask_mode='roi')
    read = with_other_lesions(ds, None)
    assert all(not torch.equal(ds[i][0]['masked_image'], read(i)[0]['masked_image']) for i in range(5))


@pytest.mark.parametrize('options', WINDOWS, ids=str)
def test_known_pixels_are_those_of_the_patch(prepared, rows, options):
    ds = LesionSynthesisDataset(prepared, rows, **options)
    for i in range(0, len(ds), 4):
        x, y = ds[i]
        known = ~x['mask']
        assert torch.equal(x['masked_image'][known], y['image'][known])
        assert not x['masked_image'][x['mask']].any() and x['mask'].any()
        assert x['mask'].dtype == torch.bool and 0 <= y['image'].min() <= y['image'].max() <= 1


def test_hole_is_the_box_and_its_margin(prepared, rows):
    ds = LesionSynthesisDataset(prepared, rows, size=64, context=None)
    for i in range(0, len(ds), 4):
        box, window = ds.place_of(i)
        grown = grow_box(box, .25)-np.tile(window[:2], 2)
        inside = ds[i][0]['mask'][0].nonzero()
        low, high = inside.min(0).values.flip(0).numpy(), inside.max(0).values.flip(0).numpy()+1
        assert (np.abs(np.clip(grown, 0, 64)-[*low, *high]) <= 1).all()
        assert (low <= np.clip(grown[:2], 0, 64)).all() and (high >= np.clip(grown[2:], 0, 64)-1e-3).all()


def test_boxes_are_shares_of_the_patch(prepared, rows):
    for options in WINDOWS:
        ds = LesionSynthesisDataset(prepared, rows, **options)
        boxes = torch.stack([ds[i][0]['box'] for i in range(len(ds))])
        assert ((boxes >= 0) & (boxes <= 1)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_boxes_do_not_depend_on_the_frame(files, rows, prepared, tmp_path):
    "The same scale in a larger frame: a window of the same width, and the box within a pixel"
    larger = prepare(files, tmp_path, (240, 200))
    for options in (dict(size=48, limits=(40, 160)), dict(size=32, context=None)):
        lesions = rows[rows.source == 'annotated']
        sets = [LesionSynthesisDataset(p, lesions, shift=0., **options) for p in (prepared, larger)]
        inner = 0
        for i in range(len(lesions)):
            (_, a), (_, b) = (ds.place_of(i) for ds in sets)
            touches = any(min(w[:2]) <= 0 or w[2] >= 144 or w[3] >= 192 for w in (a, b))
            if touches or sets[0].prepared.load(lesions.image_id[i]).scale != sets[1].prepared.load(lesions.image_id[i]).scale:
                continue
            inner += 1
            assert a[2]-a[0] == b[2]-b[0]
            assert torch.allclose(sets[0][i][0]['box'], sets[1][i][0]['box'], atol=1.01/(a[2]-a[0]))
        assert inner > 3


def test_boxes_do_not_depend_on_the_resolution(files, rows, prepared, tmp_path):
    "Half as many pixels: the box is the same share of the patch, within the rounding of windows"
    half = prepare(files, tmp_path, (96, 72))
    lesions = rows[rows.source == 'annotated']
    options = dict(size=48, limits=(40, 160))
    fine, coarse = (LesionSynthesisDataset(p, lesions, **options) for p in (prepared, half))
    a, b = (torch.stack([ds[i][0]['box'] for i in range(len(lesions))]) for ds in (fine, coarse))
    narrow = min(w[2]-w[0] for w in map(coarse.window, range(len(lesions))))
    assert (a-b).abs().max() < 2.5/narrow
    assert (a-b).abs().mean() < .02


def test_laterality_comes_from_its_own_column():
    for laterality, index in (('L', 0), ('R', 1), (np.nan, 2), (None, 2)):
        for view in ('CC', 'MLO', np.nan):
            encoded = encode_attributes(dict(laterality=laterality, view=view))
            assert int(encoded['laterality']) == index
            assert int(encoded['view']) == {'CC': 0, 'MLO': 1}.get(view, 2)


def test_both_lateralities_reach_the_batches(prepared, rows):
    ds = LesionSynthesisDataset(prepared, rows, size=16, limits=(40, 160))
    found = [int(ds[i][0]['laterality']) for i in range(len(ds))]
    assert [0 if s == 'L' else 1 for s in ds.rows.laterality] == found and set(found) == {0, 1}


def test_unknown_is_the_index_after_the_last_class():
    for missing in (None, np.nan, 'E', 3):
        encoded = encode_attributes(dict(density=missing, birads=None if missing == 3 else missing))
        assert int(encoded['density']) == ATTRIBUTES['density']
        assert int(encoded['birads']) == ATTRIBUTES['birads']
    assert encode_attributes(pd.Series(dict(kinds=np.nan)))['category'].isnan().all()
    with pytest.raises(InputError, match='cyst'): encode_attributes(dict(kinds='mass cyst'))


def test_attributes_have_the_agreed_types(prepared, rows):
    x, y = LesionSynthesisDataset(prepared, rows, size=16, limits=(40, 160))[0]
    assert list(x) == ['masked_image', 'mask', 'density', 'view', 'laterality', 'birads', 'category', 'box']
    assert all(x[name].dtype == torch.int64 and x[name].ndim == 0 for name in ATTRIBUTES)
    assert x['category'].shape == (len(KINDS),) and x['box'].shape == (4,)
    assert {x[name].dtype for name in ('masked_image', 'category', 'box')} == {torch.float32}
    assert list(y) == ['image']


def test_findings_with_one_box_are_one_row(files):
    first = files.findings.iloc[[0]]
    twin = first.assign(finding_id='twin', kind='calcification', birads='5', pathology='malignant')
    near = first.assign(finding_id='near', kind='distortion', xmin=first.xmin+1)
    both = files.with_tables(findings=pd.concat([files.findings, twin, near]))
    rows = lesion_patches(both, KINDS)
    assert len(rows) == len(annotated_patches(both, KINDS))-1
    joined = rows[rows.finding_id.str.endswith(' twin')]
    assert len(joined) == 1 and joined.birads.item() == '5' and joined.label.item() == 1
    assert encode_attributes(joined.iloc[0])['category'].sum() == 2
    only = lesion_patches(both, 'calcification')
    assert 'twin' in ' '.join(only.finding_id) and 'near' not in ' '.join(only.finding_id)
    assert only[only.finding_id.str.endswith('twin')].kinds.item() == 'mass calcification'


def test_a_finding_without_category_has_that_of_its_image(files):
    findings = files.findings.assign(birads=np.nan)
    findings['birads'] = findings.birads.astype('str')
    rows = lesion_patches(files.with_tables(findings=findings))
    of_image = files.images.set_index('image_id').birads
    assert rows.birads.tolist() == of_image.loc[rows.image_id].tolist()


def test_no_finding_is_no_row_and_unknown_kinds_are_refused(files):
    none = lesion_patches(files.with_tables(findings=files.findings[:0]))
    assert len(none) == 0 and 'kinds' in none
    with pytest.raises(InputError, match='cyst'): lesion_patches(files, ('cyst',))


def test_healthy_boxes_lie_in_the_breast(prepared, rows):
    healthy = rows[rows.source == 'healthy']
    assert len(healthy) == (rows.source == 'annotated').sum()
    assert not set(healthy.image_id) & set(prepared.cohort.findings.image_id)
    outside = 0
    for row in healthy.itertuples():
        image = prepared.load(row.image_id)
        x0, y0, x1, y1 = image.boxes([[getattr(row, c) for c in CORNERS]], clip=False)[0].round().astype(int)
        assert x0 >= 0 and y0 >= 0 and x1 <= 144 and y1 <= 192
        part = image.mask[y0:y1, x0:x1]
        assert part.size == (x1-x0)*(y1-y0)
        outside += part.size-part.sum()
    assert outside == 0


def test_healthy_boxes_are_as_large_as_lesions_of_their_split_and_view(prepared, rows):
    sizes = {}
    for row in rows.itertuples():
        image = prepared.load(row.image_id)
        x0, y0, x1, y1 = image.boxes([[getattr(row, c) for c in CORNERS]])[0]
        mm = np.array([x1-x0, y1-y0])*image.spacing_mm
        sizes.setdefault((row.split, row.view, row.source), []).append(mm)
    for (split, view, source), own in sizes.items():
        if source != 'healthy': continue
        lesions = np.array(sizes[split, view, 'annotated'])
        for mm in own: assert (np.abs(lesions-mm).max(1) < 2.6).any() # two pixels of 1.25 mm


def test_healthy_patches_are_reproducible_and_of_one_split(prepared, files):
    lesions = lesion_patches(files)
    a, b = (healthy_patches(prepared, lesions, 2, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(a, b)
    assert not a.equals(healthy_patches(prepared, lesions, 2, seed=4))
    assert len(a) == 2*len(lesions) and a.finding_id.is_unique
    split = files.images.set_index('image_id').split
    assert (split.loc[a.image_id].to_numpy() == a.split.to_numpy()).all()
    assert set(a.birads) <= {'1', '2'} and (a.kinds == '').all()


def test_suspicious_images_without_boxes_are_not_healthy(files, prepared):
    lesions = lesion_patches(files)
    chosen = healthy_patches(prepared, lesions)
    images = files.images.copy()
    images.loc[images.image_id == chosen.image_id[0], 'birads'] = '4'
    images.loc[images.image_id == chosen.image_id[1], 'birads'] = np.nan
    before = prepared.cohort
    prepared.cohort = Cohort(images, files.findings, root=files.root)
    try: again = healthy_patches(prepared, lesions)
    finally: prepared.cohort = before
    assert chosen.image_id[0] not in set(again.image_id)
    unknown = again[again.image_id == chosen.image_id[1]]
    assert (unknown.birads == '1').all()


def test_place_box_against_a_search_of_all_places():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((12, 9)) < .7
        w, h = rng.integers(1, 8, 2)
        x0, y0, x1, y1 = place_box(mask, (w, h), rng)
        shares = [mask[r:r+h, c:c+w].sum() for r in range(13-h) for c in range(10-w)]
        assert (x1-x0, y1-y0) == (w, h) and mask[y0:y1, x0:x1].sum() == max(shares)
    assert place_box(mask, (50, 50), rng) == (0, 0, 9, 12)


def test_windows_are_deterministic_and_shifted(prepared, rows):
    options = dict(size=32, limits=(40, 160))
    a, b = (LesionSynthesisDataset(prepared, rows, **options) for _ in range(2))
    shuffled = rows.sample(frac=1, random_state=0)
    c = LesionSynthesisDataset(prepared, shuffled, **options)
    other = LesionSynthesisDataset(prepared, rows, window_seed=1, **options)
    middle = LesionSynthesisDataset(prepared, rows, shift=0, **options)
    n = range(len(rows))
    assert [a.window(i) for i in n] == [b.window(i) for i in n]
    assert {c.rows.finding_id[i]: c.window(i) for i in n} == {a.rows.finding_id[i]: a.window(i) for i in n}
    assert sum(a.window(i) != other.window(i) for i in n) > .8*len(rows)
    centre = lambda ds: np.array([ds[i][0]['box'].view(2, 2).mean(0).tolist() for i in n])
    assert centre(a).std() > centre(middle).std()
    assert np.median(np.abs(centre(middle)-.5)) < .02


def test_a_window_holds_the_hole_and_stays_in_the_image():
    rng = rng_for(0, 'windows')
    for _ in range(300):
        x0, y0 = rng.uniform(0, 80, 2)
        box = x0, y0, x0+rng.uniform(1, 19), y0+rng.uniform(1, 19)
        window = place_window(box, 40, (100, 100), rng.uniform(0, 1, 2))
        assert 0 <= min(window[:2]) and max(window[2:]) <= 100 and window[2]-window[0] == 40
        grown = np.clip(grow_box(box), 0, 100)
        assert (grown[:2] >= np.array(window[:2])-1).all() and (grown[2:] <= np.array(window[2:])+1).all()


@pytest.mark.parametrize('window', [(10, 20, 42, 52), (-8, -8, 24, 24), (120, 170, 152, 202), (0, 0, 192, 192)])
def test_paste_is_the_inverse_of_cut(window):
    image = torch.rand(1, 192, 144, generator=torch.Generator().manual_seed(0))
    size = window[2]-window[0]
    patch = cut_window(image, window, size)
    assert torch.equal(paste_patch(image, patch, window), image)
    assert torch.equal(paste_patch(torch.zeros_like(image), patch, window) > 0, inside(window, image) & (image > 0))
    assert torch.equal(cut_window(paste_patch(image, 1-patch, window), window, size)[patch > 0], (1-patch)[patch > 0])


def inside(window, image):
    "[1,H,W] bool, the pixels of a window"
    x0, y0, x1, y1 = window
    rows, columns = (torch.arange(n) for n in image.shape[1:])
    return (((rows >= y0) & (rows < y1))[:, None] & ((columns >= x0) & (columns < x1)))[None]


@pytest.mark.parametrize('size', [8, 32, 96])
def test_paste_changes_nothing_outside(size):
    image = torch.rand(1, 192, 144, generator=torch.Generator().manual_seed(0))
    window, patch = (100, 30, 140, 70), torch.rand(1, size, size)
    pasted = paste_patch(image, patch, window)
    outside = ~inside(window, image)
    assert torch.equal(pasted[outside], image[outside]) and not torch.equal(pasted, image)
    assert torch.equal(paste_patch(image, patch, window, torch.zeros(1, size, size, dtype=bool)), image)
    hole = torch.zeros(1, size, size, dtype=bool)
    hole[:, :size//2] = True
    assert torch.equal(paste_patch(image, patch, window, hole)[:, 52:], image[:, 52:])


def test_one_patch_pixel_is_one_prepared_pixel(prepared, rows):
    "`fixed_mm` of as many pixels as the patch: the pixels of the image, bit for bit"
    ds = LesionSynthesisDataset(prepared, rows, size=40, fixed_mm=50.)
    for i in range(0, len(ds), 5):
        image = prepared.load(ds.rows.image_id[i])
        assert image.spacing_mm == 1.25
        x0, y0, x1, y1 = ds.window(i)
        assert torch.equal(ds[i][1]['image'], torch.from_numpy(image.image)[:, y0:y1, x0:x1])


def test_limits_are_stored_pixels(files, rows, prepared, tmp_path):
    half = prepare(files, tmp_path, (96, 72))
    for p in (prepared, half):
        ds = LesionSynthesisDataset(p, rows, size=32, limits=(50, 60))
        for i in range(5):
            x0, _, x1, _ = ds.window(i)
            scale = p.load(ds.rows.image_id[i]).scale
            assert 50*scale-.5 <= x1-x0 <= 60*scale+.5


def test_augmentation_moves_box_and_hole_together(prepared, rows):
    ds = LesionSynthesisDataset(prepared, rows, size=64, limits=(40, 160))
    x, y = ds[0]
    torch.manual_seed(0)
    n = 16
    batch = [type(part)({k: v[None].repeat_interleave(n, 0) for k, v in part.items()}) for part in (x, y)]
    ax, ay = LesionAugment(rotate=5, shift=.05, scale=.05, flip=.5).encodes(tuple(batch))
    assert torch.equal(ay['image'][~ax['mask']], ax['masked_image'][~ax['mask']])
    assert not ax['masked_image'][ax['mask']].any()
    for box, mask in zip(ax['box'], ax['mask']):
        centre = mask[0].nonzero().float().mean(0).flip(0)/64
        assert (centre-(box[:2]+box[2:])/2).abs().max() < .03
    assert ax['box'].std(0).min() > .005
    for name in ATTRIBUTES: assert torch.equal(ax[name], batch[0][name])


def test_augmentation_leaks_nothing(prepared, rows):
    ds = LesionSynthesisDataset(prepared, rows, size=64, limits=(40, 160))
    read = with_other_lesions(ds, 1.)
    results = []
    for x, y in (ds[0], read(0)):
        torch.manual_seed(1)
        batch = tuple(type(part)({k: v[None] for k, v in part.items()}) for part in (x, y))
        results.append(LesionAugment(rotate=8, shift=.05, scale=.08).encodes(batch)[0])
    for name in results[0]: assert torch.equal(*(r[name] for r in results)), name


def test_unknown_boxes_survive_augmentation(prepared, rows):
    x, y = LesionSynthesisDataset(prepared, rows, size=32, limits=(40, 160))[0]
    x['box'] = torch.full((4,), torch.nan)
    batch = tuple(type(part)({k: v[None] for k, v in part.items()}) for part in (x, y))
    assert LesionAugment(flip=1.).encodes(batch)[0]['box'].isnan().all()


def test_loaders_guard_patients_and_describe_training(prepared):
    options = dict(bs=4, size=32, limits=(40, 160), device='cpu')
    dls = lesion_dls(prepared, healthy=.5, seed=0, **options)
    sets = [set(ds.rows.patient_id) for ds in (dls.train_ds, dls.valid_ds)]
    assert not sets[0] & sets[1]
    about = dls.description
    assert about['mask_mode'] == 'hole' and about['size'] == 32 and about['splits'] == ['train', 'valid']
    assert about['cohort']['cases'] == len(dls.train_ds)
    x, y = dls.one_batch()
    assert x['mask'].shape == y['image'].shape == (4, 1, 32, 32)
    rows = dls.train_ds.rows
    with pytest.raises(InputError, match='split'):
        lesion_dls(prepared, rows=rows.assign(split='valid'), **options)
    with pytest.raises(InputError, match='LesionAugment'): lesion_dls(prepared, augment=Augment(), **options)


@pytest.mark.parametrize('options, word', [
    (dict(size=60), 'multiple of 8'), (dict(shift=1.5), 'shift'), (dict(margin=-1), 'margin'),
    (dict(mask_mode='keep'), 'mask_mode'), (dict(context=.5), 'context'), (dict(fixed_mm=0), 'fixed_mm')])
def test_wrong_settings_are_refused(prepared, rows, options, word):
    with pytest.raises(InputError, match=word): LesionSynthesisDataset(prepared, rows, **options)


def test_cut_hole_of_a_box_outside_the_window():
    "A window that does not touch the box has an empty mask and its true pixels"
    image = torch.rand(1, 64, 64)
    masked, mask = cut_hole(image, hole_mask((40, 40, 50, 50), (64, 64)), (0, 0, 16, 16), 16)
    assert not mask.any() and torch.equal(masked, image[:, :16, :16])
