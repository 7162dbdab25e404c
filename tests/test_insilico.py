"""In-silico cohorts as tables and files: processes, stopped runs, other sizes and formats, and what the pages must state."""
import hashlib
import json
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from mammo_nb.core.errors import InputError
from mammo_nb.core.geometry import mask_box
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.dicom.mammogram import read_mammogram
from mammo_nb.gaze.miceye import read_miceye
from mammo_nb.insilico import files as insilico_files
from mammo_nb.insilico.config import InSilicoConfig, parse_settings
from mammo_nb.insilico.files import InSilicoCohort, gaze_targets, insilico_cohort, write_insilico
from mammo_nb.insilico.images import render, summation_shadows
from mammo_nb.insilico.patients import draw_patient
from mammo_nb.insilico.prepared_truth import prepared_flow
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.preparation.prepare import PrepareConfig

SMALL = dict(rows=96, cols=72, pixel_spacing_mm=2.5)
QUIET = dict(workers=1, progress=False)
PAGES = Path(__file__).resolve().parents[1]/'nbs'/'insilico'

def digests(folder):
    "SHA-256 of each image, mask and log"
    files = [p for p in sorted(folder.rglob('*')) if p.suffix in ('.dcm', '.png', '.txt')]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

def stored_image(settings, row):
    "The pixels that the row of an image stands for"
    return render(settings, int(row.patient_index), int(row.exam_index), row.laterality, row.view)

# ---- files

def test_same_bytes_for_any_number_of_workers_and_patients(tmp_path):
    few, more = (insilico_cohort(n, seed=4, **SMALL) for n in (3, 5))
    write_insilico(few, tmp_path/'one', **QUIET)
    write_insilico(more, tmp_path/'two', workers=2, progress=False)
    one, two = digests(tmp_path/'one'), digests(tmp_path/'two')
    assert len([name for name in one if name.endswith('.dcm')]) == 3*2*4
    assert all(two[name] == digest for name, digest in one.items())

def test_files_tables_masks_and_gaze_agree(tmp_path):
    cohort = write_insilico(insilico_cohort(8, seed=1), tmp_path, progress=False)
    assert len(cohort.findings) > 4
    for finding in cohort.findings.head(6).itertuples():
        mask = np.asarray(Image.open(cohort.file(finding.mask_path)))
        np.testing.assert_array_equal(mask_box(mask), [finding.xmin, finding.ymin, finding.xmax, finding.ymax])
    for row in cohort.images.iloc[::9].itertuples():
        mammogram = read_mammogram(cohort.file(row.image_id))
        assert (mammogram.laterality, mammogram.view) == (row.laterality, row.view)
        assert mammogram.pixels.shape == (384, 288)
        log, = read_miceye(cohort.file(row.gaze_path))
        near = (log['points'] >= -30).all(1) & (log['points'] <= [414, 318]).all(1)
        assert len(log['points']) > 50
        assert near.mean() > .95
    known = pd.read_parquet(tmp_path/'truth.parquet')
    assert set(known.patient_id) == set(cohort.patients)
    assert known.true_risk_5y.between(0, 1).all()

def test_png_option_has_the_same_image(tmp_path):
    cohort = write_insilico(insilico_cohort(1, **SMALL), tmp_path, format='png', **QUIET)
    row = next(cohort.images.iloc[2:3].itertuples())
    stored = np.asarray(Image.open(cohort.file(row.image_id)))
    np.testing.assert_array_equal(stored, stored_image(InSilicoConfig(**SMALL), row)*16)

def test_a_stopped_write_is_continued(tmp_path):
    cohort = insilico_cohort(2, **SMALL)
    write_insilico(cohort, tmp_path, **QUIET)
    whole = digests(tmp_path)
    (tmp_path/'insilico.json').unlink()
    next(tmp_path.rglob('*.dcm')).write_bytes(b'half')
    write_insilico(cohort, tmp_path, **QUIET)
    assert digests(tmp_path) == whole

def test_lost_files_are_made_again(tmp_path):
    written = write_insilico(insilico_cohort(2, **SMALL), tmp_path, **QUIET)
    whole = digests(tmp_path)
    written.file(written.images.gaze_path[0]).unlink()
    write_insilico(insilico_cohort(2, **SMALL), tmp_path, **QUIET)
    assert digests(tmp_path) == whole

def test_a_selection_is_another_cohort(tmp_path):
    cohort = insilico_cohort(1, **SMALL)
    write_insilico(cohort, tmp_path, **QUIET)
    with pytest.raises(InputError, match='another in-silico cohort'):
        write_insilico(cohort.select("view == 'CC'"), tmp_path, **QUIET)

def test_files_of_other_code_are_refused(tmp_path, monkeypatch):
    cohort = insilico_cohort(1, **SMALL)
    write_insilico(cohort, tmp_path, **QUIET)
    monkeypatch.setattr(insilico_files, 'generator_hash', lambda: 'other')
    with pytest.raises(InputError, match='other code'):
        write_insilico(cohort, tmp_path, **QUIET)

def test_the_table_alone_is_enough_to_draw_its_images_again(tmp_path):
    cohort = write_insilico(insilico_cohort(1, seed=6, **SMALL), tmp_path, **QUIET)
    row = next(Cohort.read(tmp_path).images.iloc[-1:].itertuples())
    pixels = read_mammogram(cohort.file(row.image_id), preset='raw').pixels
    np.testing.assert_array_equal(pixels, stored_image(parse_settings(row.provenance), row))

# ---- the cohort that writes itself

def test_write_renders_and_returns_an_ordinary_cohort(tmp_path):
    drawn = insilico_cohort(2, seed=1, **SMALL)
    written = drawn.write(tmp_path/'files', **QUIET)
    assert type(drawn) is InSilicoCohort
    assert type(written) is Cohort
    assert written.root == tmp_path/'files'
    assert all(written.file(i).is_file() for i in written.images.image_id)
    again = Cohort.read(tmp_path/'files')
    pd.testing.assert_frame_equal(again.images, written.images)
    pd.testing.assert_frame_equal(again.findings, written.findings)

def test_write_is_write_insilico(tmp_path):
    one, two = (insilico_cohort(1, seed=2, **SMALL) for _ in range(2))
    one.write(tmp_path/'one', **QUIET)
    write_insilico(two, tmp_path/'two', **QUIET)
    assert digests(tmp_path/'one') == digests(tmp_path/'two')

def test_write_reuses_a_finished_folder(tmp_path):
    cohort = insilico_cohort(1, **SMALL)
    first = cohort.write(tmp_path, **QUIET)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.dcm')}
    second = cohort.write(tmp_path, **QUIET)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.dcm')} == before
    pd.testing.assert_frame_equal(first.images, second.images)

def test_a_selection_can_be_written(tmp_path):
    cohort = insilico_cohort(2, exams=1, **SMALL)
    left = cohort.select("laterality == 'L'")
    assert type(left) is InSilicoCohort
    written = left.write(tmp_path, **QUIET)
    assert set(written.images.laterality) == {'L'}
    assert all(written.file(i).is_file() for i in written.images.image_id)

def test_a_written_cohort_writes_tables_only(tmp_path):
    written = insilico_cohort(1, **SMALL).write(tmp_path/'files', **QUIET)
    written.write(tmp_path/'tables')
    assert not list((tmp_path/'tables').rglob('*.dcm'))

# ---- tables

def test_prior_is_before_current_and_years_run_down():
    cohort = insilico_cohort(60, seed=2, exams=3, **SMALL)
    exams = cohort.exams()
    assert (exams.groupby('patient_id').size() == 3).all()
    assert exams.years_since_previous.dropna().between(.99, 3.01).all()
    images = cohort.images.dropna(subset=['years_to_cancer'])
    images = images.drop_duplicates(['exam_id', 'laterality']).sort_values('exam_date')
    steps = images.groupby(['patient_id', 'laterality']).years_to_cancer.diff().dropna()
    assert len(steps) > 10
    assert (steps < 0).all()

@pytest.mark.parametrize('bad, named', [
    (dict(prevalence=-1), 'prevalence'), (dict(exams=0), 'exams'), (dict(pixel_spacing_mm=0), 'mm'),
    (dict(motion=float('nan')), 'motion'), (dict(rows=-4), 'rows'), (dict(size=3), 'size'),
    (dict(version='insilico-v9'), 'version'), (dict(contrast='x'), 'contrast')])
def test_bad_parameters_are_named(bad, named):
    with pytest.raises(InputError, match=named):
        insilico_cohort(1, **bad)

def test_todays_reading_does_not_know_the_future():
    "A visible cancer is a finding whether or not follow-up lasts until its diagnosis; only its pathology is unknown then"
    findings = insilico_cohort(1500, seed=11, exams=1, prevalence=0.).findings
    unknown = findings[findings.pathology.isna()]
    later = findings[findings.pathology == 'malignant']
    assert len(unknown) > 3
    assert unknown.birads.notna().all()
    assert unknown.years_before_diagnosis.isna().all()
    suspicious = [f.birads.isin(['4A', '4B', '4C', '5']).mean() for f in (unknown, later)]
    assert abs(suspicious[0]-suspicious[1]) < .35
    assert suspicious[0] > .4

def test_exam_birads_is_that_of_the_worst_finding():
    cohort = insilico_cohort(60, seed=12, exams=1)
    images = cohort.images[['image_id', 'exam_id', 'laterality', 'birads']]
    findings = cohort.findings.merge(images, on='image_id', suffixes=('', '_breast'))
    breasts = findings.groupby(['exam_id', 'laterality'])
    assert (breasts.birads.max() == breasts.birads_breast.first()).all()

def test_names_of_lesions_reveal_nothing():
    names = insilico_cohort(60, seed=12, exams=1).findings.lesion_id
    assert names.str.fullmatch(r'IS0012-\d{5}-[0-9a-f]{8}').all()

# ---- decoys and shortcuts

def test_shortcut_only_in_the_training_split():
    plain, trap = (InSilicoConfig(seed=5, shortcut=shortcut, **SMALL) for shortcut in (False, True))
    marked = {'train': [], 'other': []}
    for index in range(60):
        patient = draw_patient(trap, index)
        if patient.years_to_cancer == 0:
            one, two = (render(s, index, 0, patient.cancer_side, 'CC') for s in (plain, trap))
            split = 'train' if patient.split == 'train' else 'other'
            marked[split].append((one != two).any())
    assert np.mean(marked['train']) > .75
    assert .1 < np.mean(marked['other']) < .9

def test_decoys_attract_the_eye_too():
    settings = InSilicoConfig(seed=7, benign=0., prevalence=0., clumps=0., shadows=3.)
    patient = next(p for p in (draw_patient(settings, i) for i in range(50)) if not p.lesions)
    targets = gaze_targets(settings, patient, 0, 'L', 'CC')
    assert len(targets) == len(summation_shadows(settings, patient, 0, 'L', 'CC')) > 0
    assert all(pull > 0 for *_, pull in targets)

# ---- truth of prepared images

def test_prepared_flow_names_what_is_wrong(tmp_path):
    cohort = insilico_cohort(1, exams=1, **SMALL).write(tmp_path/'files', **QUIET)
    prepared = prepare_cohort(cohort, tmp_path/'cache', PrepareConfig(size=(48, 36)), **QUIET)
    image_id = cohort.images.image_id[0]
    with pytest.raises(InputError, match='an image of the cohort'):
        prepared_flow(prepared, 'nobody', image_id)
    with pytest.raises(InputError, match='prepare_cohort'):
        prepared_flow(cohort, image_id, image_id)

# ---- what the pages must state

def prose(page):
    cells = json.loads((PAGES/page).read_text(encoding='utf-8'))['cells']
    return ' '.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')

@pytest.mark.parametrize('page', ['14_config.ipynb', '15_patients.ipynb', '35_tables.ipynb', '40_files.ipynb', '50_oracle.ipynb'])
def test_pages_with_risks_state_the_enrichment(page):
    text = prose(page)
    assert 'enriched' in text
    assert f'{InSilicoConfig().prevalence*100:.0f} %' in text or '400 of 1000' in text
    assert 'screening' in text or page == '35_tables.ipynb'

def test_the_figure_of_risks_states_the_enrichment():
    cells = json.loads((PAGES/'15_patients.ipynb').read_text(encoding='utf-8'))['cells']
    figure, = [''.join(c['source']) for c in cells if "xlabel='true 5-year risk" in ''.join(c['source'])]
    caption = next(l for l in figure.splitlines() if l.startswith('#| fig-cap'))
    assert '40 % have a cancer at the exam' in caption
    assert figure.count("true 5-year risk, enriched cohort") == 2
