"Helpers of the benchmarks of LesionLDM: the pasted rival, what is asked, few patients, agreement by hand."
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from benchmarks import _lesions, lesion_downstream
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.models.lesion_condition import unknown_attributes
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.samples.lesion_synthesis import KINDS, LesionSynthesisDataset, encode_attributes, lesion_patches

MASS = torch.tensor([float(kind == 'mass') for kind in KINDS])


def inputs_of(masses, categories, sides=None):
    "Inputs of patches; `sides` of their boxes, shares of a patch"
    n = len(masses)
    box = torch.tensor([[.1, .1, .1+side, .1+side] for side in sides or [.3]*n])
    birads = torch.stack([encode_attributes(dict(birads=category))['birads'] for category in categories])
    return unknown_attributes(n) | dict(category=torch.tensor(masses)[:, None]*MASS, birads=birads, box=box)


def hole(x0, y0, x1, y1, size=32):
    mask = torch.zeros(1, 1, size, size, dtype=torch.bool)
    mask[..., y0:y1, x0:x1] = True
    return mask


def test_boxes_of_holes():
    mask = torch.cat([hole(3, 5, 10, 9), hole(0, 0, 32, 1)])
    assert _lesions.hole_boxes(mask).tolist() == [[3, 5, 10, 9], [0, 0, 32, 1]]


def test_a_donor_is_of_the_asked_class_and_of_the_nearest_size():
    train = inputs_of([1., 1., 1., 0., 0.], ['5', '5', '2', '1', '1'], [.2, .4, .3, .3, .5])
    asked = inputs_of([1., 1., 0.], ['4C', '2', '1'], [.39, .2, .31])
    assert _lesions.suspicion(train).tolist() == [2, 2, 1, 0, 0]
    assert _lesions.nearest_donors(asked, train, 0).tolist() == [1, 2, 3]
    assert _lesions.nearest_donors(asked, train, 1)[[0, 2]].tolist() == [0, 4]


def test_a_pasted_lesion_changes_its_hole_only_and_takes_the_level_around_it():
    patch, donor = torch.full((1, 32, 32), .4), torch.full((1, 32, 32), .1)
    donor[:, 13:19, 13:19] = .6 # a lesion .5 brighter than its surroundings
    mask = hole(8, 8, 24, 24)[0]
    out = _lesions.blend(patch, mask, torch.tensor([8, 8, 24, 24]), donor, torch.tensor([8, 8, 24, 24]))
    assert torch.equal(out[~mask], patch[~mask])
    assert out[0, 16, 16].item() == pytest.approx(.9, abs=1e-5)
    assert out[0, 10, 10].item() == pytest.approx(.4, abs=1e-5)


def test_asking_moves_whole_answers_and_nothing_else():
    rows = pd.DataFrame(dict(
        finding_id=list('abcdef'), kinds=['mass', '', 'mass', '', 'mass', ''], birads=list('513141'), label=[1., 0., 0., 0., 1., 0.],
        density=list('ABCDAB')))
    asked = _lesions.ask_other(rows, 3)
    answers = lambda t: sorted(zip(t.kinds, t.birads, t.label))
    assert answers(asked) == answers(rows)
    assert asked[['finding_id', 'density']].equals(rows[['finding_id', 'density']])
    assert not asked.kinds.equals(rows.kinds) or not asked.birads.equals(rows.birads)


def test_agreement_counts_known_heads():
    inputs = inputs_of([1., 1., 0.], ['5', None, '1'])
    read = dict(mass=torch.tensor([1, 0, 0]), birads=torch.tensor([0, 1, 1]))
    verifier = SimpleNamespace(buckets='suspicious', predict_attributes=lambda images: read)
    rows = pd.DataFrame(dict(patient_id=list('abc'), finding_id=list('xyz')))
    table = _lesions.agreement(verifier, None, inputs, rows)
    assert table['value'].tolist() == [.5, 0., 1.] # mass right and category wrong; mass wrong; mass right, no category to grade


def test_few_patients_are_of_training_and_differ_between_seeds():
    rows = pd.DataFrame(dict(patient_id=[f'P{i//2}' for i in range(400)], split=['train']*240+['valid']*80+['test']*80))
    few, other = (lesion_downstream.few_rows(rows, seed) for seed in (0, 1))
    assert few.groupby('split').patient_id.nunique().to_dict() == dict(train=lesion_downstream.FEW, valid=10)
    assert len(few) == 2*(lesion_downstream.FEW+10)
    assert set(few.patient_id) != set(other.patient_id)
    assert few.equals(lesion_downstream.few_rows(rows, 0))


def test_drawings_replace_the_last_patches_only(tmp_path):
    cohort = insilico_cohort(6, seed=4, exams=1, benign=1., prevalence=.8, calcified=0., rows=192, cols=144, pixel_spacing_mm=1.25)
    files = cohort.write(tmp_path/'files', workers=1, progress=False)
    prepared = prepare_cohort(files, tmp_path/'cache', size=(192, 144), workers=1, progress=False)
    base = LesionSynthesisDataset(prepared, lesion_patches(prepared.cohort)[:5], size=16, context=None)
    drawn = torch.rand(2, 1, 16, 16)
    own, true = lesion_downstream.DrawnPatches(base, drawn), [base[i][1]['image'] for i in range(len(base))]
    assert len(own) == len(base) == 5
    for i in range(5): assert torch.equal(own[i][1]['image'], true[i] if i < 3 else drawn[i-3])
