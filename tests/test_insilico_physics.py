"""The physics of in-silico patients against independent calculations: rays, warps, volumes; and bad parameters by name."""
from dataclasses import replace
from types import SimpleNamespace
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import integrate, ndimage
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import rng_for
from mammo_nb.insilico.blobs import GaussianBlobs, parenchyma
from mammo_nb.insilico.config import InSilicoConfig, parse_settings
from mammo_nb.insilico.deformation import deform, draw_deformation
from mammo_nb.insilico.exposure import expose
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.insilico.gaze_simulator import record, write_miceye
from mammo_nb.insilico.ground_truth import known_flow, truth
from mammo_nb.insilico.images import add_shortcut, render
from mammo_nb.insilico.lesions import mass
from mammo_nb.insilico.oracle import latent_risk, lead_times, oracle_risk
from mammo_nb.insilico.patients import draw_patient
from mammo_nb.insilico.projection import (
    VBD, Breast, Grid, glandular_map, project, thickness_map, with_density
)

AXES = np.array([85., 75., 65.])

def tissue(patient, side):
    return parenchyma(rng_for(patient, 'both'), rng_for(patient, side), AXES)

def a_breast(density='C', fraction=.11):
    return with_density(Breast(tuple(AXES), 55., density, fraction, tissue(1, 'L')))

# ---- projection

def test_a_pixel_is_the_integral_along_its_ray():
    grid = Grid()
    one = GaussianBlobs(np.array([[60, 10, 15.]]), np.array([5.]), np.array([.8]))
    image, row, col, tilt = project(one, grid, 45), 190, 90, np.deg2rad(45)
    up = np.array([0, np.cos(tilt), np.sin(tilt)])
    beam = np.array([0, np.sin(tilt), -np.cos(tilt)])
    pixel = np.array([grid.x[col], 0, 0])-grid.v[row]*up
    def density(s): return .8*np.exp(-((pixel+s*beam-one.xyz[0])**2).sum()/50)
    assert abs(image[row, col]-integrate.quad(density, -60, 60)[0]) < 1e-3

def test_both_breasts_resemble_each_other_more_than_another_patient():
    def coarse(blobs): return ndimage.gaussian_filter(project(blobs, Grid(), 0), 8)[80:300, :120].ravel()
    left, right, other = (coarse(tissue(*key)) for key in ((1, 'L'), (1, 'R'), (2, 'L')))
    assert np.corrcoef(left, right)[0, 1] > np.corrcoef(left, other)[0, 1]+.1

def test_one_body_has_nearly_the_same_volume_in_both_views():
    thin, grid = a_breast('A', .01), Grid()
    cc, mlo = (glandular_map(thin, grid, view).sum() for view in ('CC', 'MLO'))
    assert abs(mlo/cc-1) < .2

@pytest.mark.parametrize('view', ['CC', 'MLO'])
def test_density_rises_with_its_grade(view):
    grades = [a_breast(d, float(np.mean(VBD[d]))) for d in 'ABCD']
    measured = [glandular_map(b, Grid(), view).sum()/thickness_map(b, Grid(), view).sum() for b in grades]
    assert (np.diff(measured) > 0).all()

# ---- deformation

def test_deform_agrees_with_simpleitk():
    grid = Grid()
    canonical = glandular_map(a_breast(), grid, 'CC')
    u = draw_deformation(rng_for(8), grid.shape).field()
    field = sitk.GetImageFromArray(u[..., ::-1].astype(np.float64), isVector=True) # SimpleITK wants (x, y)
    transform = sitk.DisplacementFieldTransform(field)
    warped = sitk.Resample(sitk.GetImageFromArray(canonical), transform, sitk.sitkBSpline, 0.)
    difference = np.abs(sitk.GetArrayFromImage(warped)-deform(canonical, u))
    assert difference[30:-30, 30:-30].max() < .05

@pytest.mark.parametrize('i', range(50))
def test_strong_deformations_do_not_fold(i):
    u = draw_deformation(rng_for(10, i), (384, 288), 3.).field()
    by_rows, by_cols = np.gradient(u, axis=(0, 1))
    jacobian = (1+by_rows[..., 0])*(1+by_cols[..., 1])-by_rows[..., 1]*by_cols[..., 0]
    assert jacobian.min() > 0

@pytest.mark.parametrize('side, view', [('L', 'CC'), ('R', 'MLO')])
def test_known_flow_aligns_noise_free_tissue(side, view):
    quiet = InSilicoConfig(seed=3, shadows=0., moles=0., benign=0., prevalence=0., clumps=0.)
    patients = [draw_patient(quiet, i) for i in range(50)]
    index = next(p.index for p in patients if p.density == 'C' and not p.lesions)
    prior, now = (render(quiet, index, exam, side, view, noise=False).astype(np.float32) for exam in (1, 0))
    prior[:60] = now[:60] = 0 # markers stay where they are
    flow = np.moveaxis(known_flow(quiet, index, side, view), 0, -1)
    inner = truth(quiet, index, 0, side, view).breast.copy()
    inner[:80] = False
    before, after = (np.abs(image-now)[inner].mean() for image in (prior, deform(prior, flow)))
    assert after < .25*before

# ---- patients and risk

def test_fewer_exams_are_the_same_patient():
    one, two = (draw_patient(InSilicoConfig(exams=n), 7) for n in (1, 2))
    assert (one.lesions, one.density, one.years_to_cancer) == (two.lesions, two.density, two.years_to_cancer)

def test_latent_risk_where_cancers_show_for_two_years():
    alone = SimpleNamespace(p_prevalent=.2, hazard=.05)
    never_hidden = latent_risk(alone, 0., np.arange(1, 6), np.zeros(1))
    np.testing.assert_allclose(never_hidden, (1-np.exp(-.05*np.arange(1, 6)))/2, atol=1e-3)
    two_years = latent_risk(alone, 0., np.array([1, 2, 5]), np.full(1, 2.))
    later = (np.exp(-.1)-np.exp(-.25))/np.exp(-.1)/2
    np.testing.assert_allclose(two_years, [0, 0, later], atol=1e-3)

@pytest.fixture(scope='module')
def thousand():
    "A thousand patients with small images"
    return insilico_cohort(1000, seed=6, rows=96, cols=72, pixel_spacing_mm=2.5)

@pytest.mark.parametrize('exam', [0, 1])
@pytest.mark.parametrize('only_hidden', [False, True])
def test_oracle_risks_come_true(thousand, exam, only_hidden):
    cohort, settings = thousand, parse_settings(thousand.images.provenance.iloc[0])
    rows = cohort.images.drop_duplicates(['exam_id', 'laterality'])
    rows = rows[rows.exam_index == exam]
    patients = [draw_patient(settings, int(i)) for i in rows.patient_index]
    times = [p.times[-1-exam] for p in patients]
    true, shows = [], []
    for p, t, side in zip(patients, times, rows.laterality):
        true.append(p.cancer_side == side and p.years_to_cancer-t <= 5)
        shows.append(any(l.malignant and l.diameter_at(t) >= 1.5 for l in p.lesions))
    chosen = ~np.array(shows) if only_hidden else np.ones(len(rows), bool)
    risk = oracle_risk(cohort, rows)
    assert risk.shape == (2000, 5)
    predicted, observed = risk[chosen, 4], np.array(true)[chosen]
    deviation = np.sqrt((predicted*(1-predicted)).sum())
    assert abs(predicted.sum()-observed.sum()) < 3*deviation+1e-9 # three standard deviations

def test_lead_times_are_those_of_the_settings():
    fast, slow = lead_times(InSilicoConfig(seed=6), smallest_mm=3.), lead_times(InSilicoConfig(seed=6))
    assert len(fast) == 4000
    assert (fast < slow).all()

def test_the_shortcut_needs_a_training_patient():
    settings = InSilicoConfig(seed=5)
    patient = next(p for p in (draw_patient(settings, i) for i in range(200)) if p.split == 'test')
    thickness, marked = np.full((60, 60), 50.), 0
    for i in range(200):
        dense = np.zeros((60, 60))
        add_shortcut(rng_for(i), patient, patient.cancer_side, thickness, dense)
        marked += dense.any()
    assert .4 < marked/200 < .6

# ---- bad parameters

@pytest.mark.parametrize('bad, named', [
    (dict(prevalence=1.2), 'prevalence: found 1.2'), (dict(rows=-5), 'rows: found -5'),
    (dict(rows=100.5), 'rows: found 100.5'), (dict(exams=1.5), 'exams: found 1.5'), (dict(shortcut='no'), 'shortcut')])
def test_bad_settings_are_named(bad, named):
    with pytest.raises(InputError, match=named):
        InSilicoConfig(**bad)

def test_bad_arguments_are_named(tmp_path):
    flat = np.full((9, 9), 50.)
    fixations = SimpleNamespace()
    calls = {
        'pixel_spacing_mm: found -1': lambda: Grid(pixel_spacing_mm=-1),
        'thickness: found -5': lambda: replace(a_breast(), thickness=-5),
        'diameter: found -3': lambda: mass(rng_for(0), 'round', -3),
        'strength: found -1': lambda: draw_deformation(rng_for(0), (9, 9), -1),
        'counts: found 0': lambda: expose(None, flat, flat, counts=0),
        'dropout: found 1.5': lambda: record(rng_for(2), fixations, dropout=1.5),
        'a path without semicolons': lambda: write_miceye(tmp_path/'log.txt', 'a;b.dcm', 1, flat),
        'n_patients: found -1': lambda: insilico_cohort(-1),
        'n_patients: found 2.5': lambda: insilico_cohort(2.5),
        "provenance: found 'CBIS-DDSM'": lambda: parse_settings('CBIS-DDSM')}
    for message, call in calls.items():
        with pytest.raises(InputError, match=message):
            call()
