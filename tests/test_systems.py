"Every registered system passes every check of `check_system`; a sixth one needs no more than sixty lines; eight lines run for each."
import ast
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import mammo_nb as mn
from mammo_nb.core.errors import InputError
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.check_system import (
    SYSTEM_CHECKS, SystemCheck, check_other_preparation, check_resume, check_system
)
from mammo_nb.learners.systems import SYSTEM_MODULES, get_system
from mammo_nb.preparation.prepared_cohort import prepare_cohort

TESTS = Path(__file__).parent


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('systems')
    cohort = insilico_cohort(24, seed=3, exams=2, rows=192, cols=144, pixel_spacing_mm=1.25)
    files = cohort.write(folder/'files', workers=1, progress=False)
    return prepare_cohort(files, folder/'cache', size=(64, 48), workers=1, progress=False)


@pytest.fixture(scope='module')
def checks(prepared, tmp_path_factory):
    "One trained learner per system, for all its checks"
    made = {}

    def get(name):
        if name not in made:
            made[name] = SystemCheck(name, prepared, tmp_path_factory.mktemp(name))
        return made[name]
    return get


@pytest.mark.parametrize('check', SYSTEM_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize('name', SYSTEM_MODULES)
def test_system(name, check, checks):
    check(checks(name))


def test_a_sixth_system_needs_sixty_lines(prepared, tmp_path):
    import toy_system
    lines = (TESTS/'toy_system.py').read_text().splitlines()
    code = [line for line in lines if line.strip() and not re.match(r'(from|import) ', line)]
    assert len(code) <= 60
    assert len(check_system(toy_system.GREY, prepared, tmp_path)) == len(SYSTEM_CHECKS)


def stand_still(learn):
    "A learner that takes steps of no length"
    learn.lr = 0.
    return learn


def test_a_system_that_does_not_train_fails_its_check(checks):
    c = SystemCheck('density', checks('density').prepared, checks('density').folder)
    c.fit = lambda learn, epochs=1: SystemCheck.fit(c, stand_still(learn), epochs)
    with pytest.raises(AssertionError, match='training did not change any weight'):
        SYSTEM_CHECKS[0](c)


def toy_check(prepared, folder, **changes):
    "The toy system, parts of it replaced"
    import toy_system
    return SystemCheck(replace(toy_system.GREY, **changes), prepared, folder)


def forgetful_learner(dls, **kwargs):
    "The learner of the toy system, without `set_training_info`"
    import toy_system
    learn = toy_system.grey_learner(dls, **kwargs)
    learn.model.set_training_info({})
    return learn


def test_a_learner_that_forgets_the_preparation_fails_its_check(prepared, tmp_path):
    check_other_preparation(toy_check(prepared, tmp_path))
    with pytest.raises(AssertionError, match='training_info has no `prepare`'):
        check_other_preparation(toy_check(prepared, tmp_path, learner=forgetful_learner))


def test_a_model_without_images_needs_no_preparation(checks):
    density = checks('density')
    assert 'prepare' not in density.trained.model.training_info
    check_other_preparation(density)


def test_a_run_without_its_data_fails_its_check(prepared, tmp_path, monkeypatch):
    import mammo_nb.learners.run_config as run_config
    monkeypatch.setattr(run_config, 'data_config', lambda dls: {})
    with pytest.raises(AssertionError, match='continued with other images'):
        check_resume(toy_check(prepared, tmp_path))


EIGHT_LINES = '''
import mammo_nb as mn

cohort = mn.insilico_cohort({patients}, seed=3, exams=2, rows=192, cols=144, pixel_spacing_mm=1.25).write(folder + '/files')
prepared = mn.prepare(cohort, folder + '/cache', size=(64, 48))
dls = mn.{dls}(prepared)
learn = mn.{learner}(dls{arguments})
learn.fit_one_cycle(1, 3e-3)
predictions = mn.predict(learn, prepared, split='test')
metrics = mn.evaluate(predictions)
learn.model.save_pretrained(folder + '/model')
'''
ENCODER = dict(width=4, stem=4, modules=(1, 1, 1), blocks=1, finest=2, sigma=3.)
DETECTOR = ENCODER | dict(channels=16, dim=32, heads=2, roi_size=3, anchor_scale=4., n_proposals=16, n_sampled=16)
AUTOENCODER = dict(channels=(4, 4, 4, 8), blocks=1, attention=False)
DIFFUSION = dict(
    denoiser='transformer', denoiser_args=dict(width=16, depth=1, heads=2), dim=16, vit=dict(dim=16, depth=1, heads=2, patch=32), steps=2)
SCRIPTS = dict(
    two_view=dict(dls='two_view_dls', learner='two_view_learner', arguments=''),
    mammonet=dict(dls='two_view_dls', learner='mammonet_learner', arguments=", 'cross_view', encoder='small', stride=8"),
    lmvnet=dict(dls='risk_dls', learner='lmvnet_learner', arguments=", encoder='small', stride=8, model_args=dict(width=4)"),
    unaligned_risk=dict(dls='risk_dls', learner='unaligned_risk_learner', arguments=", encoder='small', stride=8, model_args=dict(width=4)"),
    current_exam=dict(dls='risk_dls', learner='current_exam_learner', arguments=", encoder='small', stride=8"),
    density=dict(dls='risk_dls', learner='density_learner', arguments=''),
    ipsidual=dict(dls='momminet_dls', learner='momminet_learner', arguments=f", 'ipsi', model_args={DETECTOR}"),
    bidual=dict(dls='momminet_dls', learner='momminet_learner', arguments=f", 'bi', model_args={ENCODER}"),
    momminet=dict(
        dls='momminet_dls', learner='momminet_learner',
        arguments=f", 'tri', ipsidual={DETECTOR}, bidual={ENCODER}, model_args=dict(width=8)"),
    malignancy=dict(dls='patch_dls', learner='malignancy_learner', arguments=", encoder='small', model_args=dict(stride=8, width=4), recipe=None"),
    radiomics_gan=dict(
        dls='view_synthesis_dls', learner='radiomics_gan_learner',
        arguments=', model_args=dict(width=4, depth=3, hidden=8), perceptual=False'),
    lesion_ldm=dict(
        dls='lesion_dls', learner='lesion_ldm_learner',
        arguments=f', autoencoder_args={AUTOENCODER}, autoencoder_epochs=1, model_args={DIFFUSION}'),
    registration=dict(dls='pair_dls', learner='registration_learner', arguments=', model_args=dict(width=4, depth=1)'))


@pytest.mark.parametrize('name', SYSTEM_MODULES)
def test_eight_lines(name, tmp_path):
    if name == 'radiomics_gan': pytest.importorskip('radiomics')
    script = EIGHT_LINES.format(patients=24, **SCRIPTS[name])
    tree = ast.parse(script)
    assert len(tree.body) - 1 <= 8
    assert sum(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(tree)) == 1
    names = dict(folder=str(tmp_path))
    exec(script, names)
    assert set(names['metrics'].system) == {get_system(name).name}
    again = mn.load_model(tmp_path/'model')
    same = mn.predict(again, names['prepared'], split='test')
    assert same.value.tolist() == names['predictions'].value.tolist()


# options and rows

def expect_refused(words, function, *args, **options):
    with pytest.raises(InputError) as e:
        function(*args, **options)
    for word in words:
        assert word in str(e.value)


@pytest.mark.parametrize('name, options, words', [
    ('lmvnet', dict(prior=2), ('found prior', 'options of lmvnet: priors, registration')),
    ('two_view', dict(batch_size=2), ('found batch_size', 'two_view has none', 'bs')),
    ('two_view', dict(mixed_precison=True), ('found mixed_precison', 'mixed_precision')),
    ('two_view', dict(registration=None), ('found registration', 'two_view has none')),
    ('registration', dict(priors=2), ('found priors', 'registration has none'))])
def test_options_that_a_system_does_not_have(name, options, words, checks):
    c = checks(name)
    expect_refused(words, c.predict, c.new_learner(), **options)


def test_options_that_a_system_has(checks):
    c = checks('lmvnet')
    learn = c.new_learner()
    assert c.predict(learn, split='test', priors=1).equals(c.predict(learn, split='test'))
    dataset = learn.dls.valid_ds
    words = ('found priors', 'none beside a dataset')
    expect_refused(words, c.predict, learn, dataset=dataset, priors=1)


def test_registered_pairs_as_rows_and_as_a_dataset(checks):
    c = checks('registration')
    learn = c.new_learner()
    expected = c.predict(learn, split='valid')
    rows = mn.exam_pairs(c.prepared.cohort)
    assert c.predict(learn, split='valid', rows=rows).equals(expected)
    by_dataset = c.predict(learn, dataset=learn.dls.valid_ds)
    assert by_dataset.equals(expected)


def test_several_priors_of_an_image_are_refused(checks):
    c = checks('registration')
    learn = c.new_learner()
    rows = mn.exam_pairs(c.prepared.cohort).head(2)
    twice = pd.concat([rows, rows.head(1)], ignore_index=True)
    words = ('1 further priors', "exam_pairs(cohort, which='previous')")
    expect_refused(words, c.predict, learn, rows=twice)
    learn.dls.valid_ds.rows = twice
    expect_refused(words, c.predict, learn, dataset=learn.dls.valid_ds)


# evaluate

def test_training_patients_among_others_raise_a_warning(checks):
    c = checks('two_view')
    table = c.predict(c.new_learner())
    patients = table.drop_duplicates('patient_id').split.value_counts()
    words = ', '.join(f'{patients[name]} {name}' for name in ('train', 'valid', 'test'))
    with pytest.warns(UserWarning, match=f'patients of training are among them .{words} patients'):
        mn.evaluate(table, n_boot=20)
    with pytest.warns(UserWarning, match=f'.{patients.train} train patients'):
        mn.evaluate(table[table.split == 'train'], n_boot=20)


@pytest.mark.parametrize('split', ('train', 'test'))
def test_a_split_that_was_asked_for_raises_no_warning(split, checks, recwarn):
    c = checks('two_view')
    table = c.predict(c.new_learner())
    mn.evaluate(table, split, n_boot=20)
    mn.evaluate(table[table.split == 'valid'].drop(columns='split'), n_boot=20)
    assert not [w for w in recwarn if 'patients of training' in str(w.message)]
