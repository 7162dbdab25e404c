"""The in-silico cohort: what a notebook shows badly (processes, whole folders, other sizes and formats)."""
import hashlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from mammo_nb.core.errors import InputError
from mammo_nb.core.geometry import mask_box
from mammo_nb.data.cohort import Cohort
from mammo_nb.data.dicom import read_mammogram
from mammo_nb.data.gaze import read_miceye
from mammo_nb.data.insilico import Settings, draw_patient, insilico_cohort, known_flow, render, truth, write_insilico
from mammo_nb.data.phantom import deform

SMALL = dict(rows=96, cols=72, mm=2.5)

def digests(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob('*')) if p.is_file() and p.suffix in ('.dcm', '.png', '.txt')}

def test_same_bytes_for_any_number_of_workers_and_patients(tmp_path):
    few, more = insilico_cohort(3, seed=4, **SMALL), insilico_cohort(5, seed=4, **SMALL)
    write_insilico(few, tmp_path/'one', workers=1, progress=False)
    write_insilico(more, tmp_path/'two', workers=2, progress=False)
    one, two = digests(tmp_path/'one'), digests(tmp_path/'two')
    assert len([k for k in one if k.endswith('.dcm')]) == 3*2*4
    assert all(two[k] == v for k, v in one.items())

def test_files_tables_masks_and_gaze_agree(tmp_path):
    c = write_insilico(insilico_cohort(8, seed=1), tmp_path, progress=False)
    assert len(c.findings) > 4
    for f in c.findings.head(6).itertuples():
        mask = np.asarray(Image.open(c.file(f.mask_path)))
        np.testing.assert_array_equal(mask_box(mask), [f.xmin, f.ymin, f.xmax, f.ymax])
    for im in c.images.iloc[::9].itertuples():
        m = read_mammogram(c.file(im.image_id))
        assert (m.laterality, m.view, m.pixels.shape) == (im.laterality, im.view, (384, 288))
        log, = read_miceye(c.file(im.gaze_path))
        inside = (log['points'] >= -30).all(1) & (log['points'] <= [414, 318]).all(1)
        assert len(log['points']) > 50 and inside.mean() > .95
    t = pd.read_parquet(tmp_path/'truth.parquet')
    assert set(t.patient_id) == set(c.patients) and t.true_risk_5y.between(0, 1).all()

def test_png_option_has_the_same_picture(tmp_path):
    c = write_insilico(insilico_cohort(1, **SMALL), tmp_path, format='png', workers=1, progress=False)
    im = c.images.iloc[2]
    got = np.asarray(Image.open(c.file(im.image_id)))
    np.testing.assert_array_equal(got, render(Settings(**SMALL), 0, int(im.exam_index), im.laterality, im.view).astype(np.uint16)*16)

def test_a_stopped_write_is_continued(tmp_path):
    c = insilico_cohort(2, **SMALL)
    write_insilico(c, tmp_path, workers=1, progress=False)
    whole = digests(tmp_path)
    (tmp_path/'insilico.json').unlink(); next(tmp_path.rglob('*.dcm')).write_bytes(b'half')
    write_insilico(c, tmp_path, workers=1, progress=False)
    assert digests(tmp_path) == whole

def test_prior_is_before_current_and_years_run_down():
    c = insilico_cohort(60, seed=2, exams=3, **SMALL)
    e = c.exams()
    assert (e.groupby('patient_id').size() == 3).all() and e.years_since_previous.dropna().between(.99, 3.01).all()
    im = c.images.dropna(subset=['years_to_cancer']).drop_duplicates(['exam_id', 'laterality']).sort_values('exam_date')
    steps = im.groupby(['patient_id', 'laterality']).years_to_cancer.diff().dropna()
    assert len(steps) > 10 and (steps < 0).all()

@pytest.mark.parametrize('side, view', [('L', 'CC'), ('R', 'MLO')])
def test_known_flow_aligns_noise_free_tissue(side, view):
    quiet = Settings(seed=3, shadows=0., moles=0., benign=0., prevalence=0., clumps=0.)
    i = next(k for k in range(50) if draw_patient(quiet, k).density == 'C' and not draw_patient(quiet, k).lesions)
    prior, now = (render(quiet, i, e, side, view, noise=False).astype(np.float32) for e in (1, 0))
    for p in (prior, now): p[:60] = 0  # markers stay where they are
    flow, inner = np.moveaxis(known_flow(quiet, i, side, view), 0, -1), truth(quiet, i, 0, side, view).breast.copy()
    inner[:80] = False
    before, after = (np.abs(a-now)[inner].mean() for a in (prior, deform(prior, flow)))
    assert after < .25*before

@pytest.mark.parametrize('bad, says', [(dict(prevalence=-1), 'prevalence'), (dict(exams=0), 'exams'), (dict(mm=0), 'mm'), (dict(motion=float('nan')), 'motion'),
                                       (dict(rows=-4), 'rows'), (dict(size=3), 'size'), (dict(version='insilico-v9'), 'version'), (dict(contrast='x'), 'contrast')])
def test_bad_parameters_are_named(bad, says):
    with pytest.raises(InputError, match=says): insilico_cohort(1, **bad)

def test_shortcut_only_in_the_training_split():
    s, plain = Settings(seed=5, shortcut=True, **SMALL), Settings(seed=5, **SMALL)
    marked = []
    for i in range(60):
        p = draw_patient(s, i)
        if p.years_to_cancer == 0: marked.append((p.split != 'train', bool((render(s, i, 0, p.cancer_side, 'CC') != render(plain, i, 0, p.cancer_side, 'CC')).any())))
    m = np.array(marked)
    assert m[~m[:, 0], 1].mean() > .75 and .1 < m[m[:, 0], 1].mean() < .9

def test_cohort_round_trip_draws_the_same_picture_from_the_table_alone(tmp_path):
    from mammo_nb.data.insilico import parse_settings
    c = write_insilico(insilico_cohort(1, seed=6, **SMALL), tmp_path, workers=1, progress=False)
    im = Cohort.read(tmp_path).images.iloc[-1]
    np.testing.assert_array_equal(read_mammogram(c.file(im.image_id), preset='raw').pixels,
                                  render(parse_settings(im.provenance), int(im.patient_index), int(im.exam_index), im.laterality, im.view))

def test_decoys_draw_the_eye_too():
    from mammo_nb.data.insilico import gaze_targets, shadows_of
    s = Settings(seed=7, benign=0., prevalence=0., clumps=0., shadows=3.)
    i = next(k for k in range(50) if not draw_patient(s, k).lesions)
    got = gaze_targets(s, draw_patient(s, i), 0, 'L', 'CC')
    assert len(got) == len(shadows_of(s, draw_patient(s, i), 0, 'L', 'CC')) > 0 and all(p > 0 for *_, p in got)

def test_todays_reading_does_not_know_the_future():
    "A visible cancer is in the findings whether or not follow-up lasts until its diagnosis; only its pathology is unknown then"
    c = insilico_cohort(1500, seed=11, exams=1, prevalence=0.)
    unknown = c.findings[c.findings.pathology.isna()]
    assert len(unknown) > 3 and unknown.birads.notna().all() and unknown.years_before_diagnosis.isna().all()
    later = c.findings[c.findings.pathology == 'malignant']
    high = [f.birads.isin(['4A', '4B', '4C', '5']).mean() for f in (unknown, later)]
    assert abs(high[0]-high[1]) < .35 and high[0] > .4

def test_exam_birads_is_that_of_the_worst_finding():
    c = insilico_cohort(60, seed=12, exams=1)
    f = c.findings.merge(c.images[['image_id', 'exam_id', 'laterality', 'birads']], on='image_id', suffixes=('', '_breast'))
    worst = f.groupby(['exam_id', 'laterality']).birads.max()
    assert (worst == f.groupby(['exam_id', 'laterality']).birads_breast.first()).all()
    assert not c.findings.lesion_id.str.contains('cancer|benign').any()

def test_files_of_other_code_are_refused(tmp_path, monkeypatch):
    from mammo_nb.data import insilico
    c = insilico_cohort(1, **SMALL)
    write_insilico(c, tmp_path, workers=1, progress=False)
    next(tmp_path.rglob('*.dcm')).unlink()
    write_insilico(c, tmp_path, workers=1, progress=False)  # what is missing is made again
    assert len(list(tmp_path.rglob('*.dcm'))) == 8
    monkeypatch.setattr(insilico, 'generator_hash', lambda: 'other')
    with pytest.raises(InputError, match='other code'): write_insilico(c, tmp_path, workers=1, progress=False)
