"The commands with the four systems of MommiNet-v2: both dual networks, the network that combines them, and the malignancy of a mass."
import numpy as np
import pandas as pd
import pytest

from mammo_nb.cli.evaluate import mammo_evaluate
from mammo_nb.cli.predict import mammo_predict
from mammo_nb.cli.train import mammo_train
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.systems import load_model
from mammo_nb.metrics.predictions import read_predictions

SIZE = '64x48'
ENCODER = "'width':4,'stem':4,'modules':(1,1,1),'blocks':1,'finest':2,'sigma':3."
DETECTOR = ENCODER + (",'channels':8,'dim':16,'heads':2,'roi_size':3,'anchor_scale':4.,"
                      "'n_proposals':8,'n_other':4,'n_sampled':8")
SMALL = "encoder=small recipe=None model_args={'stride':8,'width':4}"


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "A folder with a cohort of twelve patients, most with masses of both kinds"
    folder = tmp_path_factory.mktemp('cohort')
    settings = dict(rows=192, cols=144, pixel_spacing_mm=1.25, benign=1., prevalence=.9, calcified=0.)
    cohort = insilico_cohort(12, seed=5, exams=1, **settings).write(folder, workers=1, progress=False)
    images = cohort.images
    number = images.patient_id.map({p: k for k, p in enumerate(sorted(set(images.patient_id)))})
    split = np.where(number < 6, 'train', np.where(number < 9, 'valid', 'test'))
    cohort.with_tables(images.assign(split=split)).write(folder)
    return folder


@pytest.fixture(scope='module')
def train(files, tmp_path_factory):
    "Function that trains a system by the command: (exit status, folder)"
    cache = tmp_path_factory.mktemp('cache')
    def run(system, settings, data='bs=8 device=cpu'):
        out = tmp_path_factory.mktemp(system)
        options = dict(size=SIZE, epochs=1, workers=1, quiet=True)
        status = mammo_train(
            system, str(files), str(out), cache=str(cache), set=settings, data=data, **options)
        return status, out
    return run


@pytest.fixture(scope='module')
def models(train):
    "System -> folder of its model; the combining network takes the folders of both dual ones"
    done = dict(
        ipsidual=train('ipsidual', f'model_args={{{DETECTOR}}}'),
        bidual=train('bidual', f'model_args={{{ENCODER}}}'),
        malignancy=train('malignancy', SMALL, 'bs=8 size=32 device=cpu'))
    parts = ' '.join(f'{name}={done[name][1]}' for name in ('ipsidual', 'bidual'))
    done['momminet'] = train('momminet', f"{parts} model_args={{'width':8}}")
    assert {status for status, _ in done.values()} == {0}
    return {name: folder for name, (_, folder) in done.items()}


METRICS = dict(
    ipsidual=['recall_0.5', 'recall_1', 'recall_2', 'mean_recall'],
    malignancy=['auc', 'brier', 'ece_10_uniform'])


@pytest.mark.parametrize('system', ['ipsidual', 'bidual', 'momminet', 'malignancy'])
def test_a_trained_system_is_predicted_and_evaluated(files, models, tmp_path, system):
    out, metrics = tmp_path/'out', tmp_path/'metrics.csv'
    status = mammo_predict(str(files), str(models[system]), out=str(out), workers=1, quiet=True)
    table = read_predictions(out/'predictions.csv')
    assert set(table.system) == {system}
    # a breast without a mass has no patch, which is said image by image
    left_out = pd.read_csv(out/'left_out.csv')
    assert status == (1 if len(left_out) else 0)
    assert table.image_id.nunique()+len(left_out) == 48
    assert (len(left_out) > 0) == (system == 'malignancy')

    arguments = dict(split='test', n_boot=20, out=str(metrics))
    assert mammo_evaluate(str(out/'predictions.csv'), **arguments) == 0
    found = pd.read_csv(metrics)
    assert found.metric.tolist() == METRICS.get(system, METRICS['ipsidual'])
    assert set(found.system) == {system}


def test_the_parts_are_the_models_of_the_folders(models):
    "The frozen parts of the combining network are those that were trained before"
    combined = load_model(models['momminet'])
    for name in ('ipsidual', 'bidual'):
        part = getattr(combined, name).state_dict()
        trained = load_model(models[name]).state_dict()
        assert set(part) == set(trained)
        for key, value in trained.items():
            assert (part[key] == value).all(), f'{name}: {key}'


@pytest.mark.parametrize('settings, said', [
    ('{no_parts}', 'ipsidual: found NoneType, expected a trained IpsiDualNet, or a folder with one'),
    ('ipsidual={bidual} bidual={ipsidual}', 'ipsidual: found BiDualNet'),
    ('ipsidual={ipsidual} bidual={ipsidual}', 'bidual: found IpsiDualNet'),
    ('ipsidual={ipsidual}/nowhere bidual={bidual}', 'nowhere: model: found no such folder'),
    ('ipsidual=3 bidual={bidual}', 'ipsidual: found int')])
def test_wrong_parts_are_named_in_one_line(models, train, capsys, settings, said):
    status, _ = train('momminet', settings.format(no_parts="model_args={'width':8}", **models))
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith('mammo_train: ') and error.count('\n') == 1
    assert said in error


def test_only_the_combining_network_has_parts(models, train, capsys):
    status, _ = train('bidual', f'ipsidual={models["ipsidual"]}')
    assert status == 2
    assert 'only tri has parts' in capsys.readouterr().err
