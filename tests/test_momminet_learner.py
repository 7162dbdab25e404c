"MommiNet in a fastai Learner: what validation may not change, what its numbers mean, boxes on the stored image, and a training in stages that is stopped."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import mammo_nb.core.fastai_import
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from tiny_prepared import TinyPrepared, tiny_images

from mammo_nb.cli.evaluate import mammo_evaluate
from mammo_nb.cli.predict import predict_folder
from mammo_nb.cli.train import train_system
from mammo_nb.core.errors import InputError
from mammo_nb.core.hub import model_version
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.detection import (
    DetectionRecall, LossesFromModel, LossTerm, class_kinds, evaluate_detections, true_box_rows
)
from mammo_nb.learners.momminet import (
    LOSS_TERMS, PRESETS, VARIANTS, momminet_cases, momminet_dls, momminet_learner, momminet_samples, show_detections
)
from mammo_nb.learners.systems import load_model
from mammo_nb.learners.momminet_stages import read_mass_maps, train_momminet, write_mass_maps
from mammo_nb.learners.run_config import run_config_of
from mammo_nb.learners.systems import evaluate, predict
from mammo_nb.metrics.predictions import BOX_COLUMNS, has_box, read_predictions, write_predictions
from mammo_nb.models.ipsidual import IpsiDualNet
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.samples.three_views import MASS_MAPS

ENCODER = dict(width=4, stem=4, modules=(1, 1, 1), blocks=1, finest=2, sigma=3.)
DETECTOR = ENCODER | dict(
    channels=8, dim=16, heads=2, roi_size=3, anchor_scale=4., n_proposals=8, n_other=4, n_sampled=8)
PARTS = dict(ipsidual=DETECTOR, bidual=ENCODER)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('momminet')
    cohort = insilico_cohort(12, seed=3, exams=1, rows=192, cols=144, pixel_spacing_mm=1.25, calcified=.4)
    images = cohort.images
    number = images.patient_id.map({p: k for k, p in enumerate(sorted(set(images.patient_id)))})
    split = np.where(number < 6, 'train', np.where(number < 9, 'valid', 'test'))
    files = cohort.write(folder/'files', workers=1, progress=False)
    files = files.with_tables(files.images.assign(split=split))
    files.write(folder/'files')
    return prepare_cohort(files, folder/'cache', size=(64, 48), workers=1, progress=False)


def loaders(prepared, **options):
    return momminet_dls(prepared, **dict(bs=4, seed=0, device='cpu') | options)


def small_learner(dls, variant='ipsi', **options):
    cls, _ = VARIANTS[variant]
    parts = PARTS if variant == 'tri' else {}
    args = dict(width=8) if variant == 'tri' else DETECTOR if 'objectness' in LOSS_TERMS[cls] else ENCODER
    return momminet_learner(dls, variant, model_args=args, seed=0, **parts, **options)


def quietly(learn, epochs=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn


@pytest.fixture(scope='module')
def dls(prepared): return loaders(prepared)


@pytest.fixture(scope='module')
def learn(dls): return quietly(small_learner(dls))


# ---- training and validation

@pytest.mark.parametrize('variant', [v for v in VARIANTS if v != 'ipsi_shuffled_nipples'])
def test_every_variant_trains_and_has_the_columns_of_its_losses(dls, variant):
    learn = quietly(small_learner(dls, variant))
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    names = LOSS_TERMS[type(learn.model)]
    assert np.isclose(sum(row[name] for name in names), row['valid_loss'], atol=1e-4)
    assert {'recall_0.5', 'recall_1', 'recall_2', 'mean_recall'} <= set(row)


def test_shuffled_nipples_need_loaders_with_them_and_others_refuse_them(prepared, dls):
    shuffled = loaders(prepared, nipples='shuffled')
    assert small_learner(shuffled, 'ipsi_shuffled_nipples').model.training_info['nipples'] == 'shuffled'
    with pytest.raises(InputError, match='true nipples'): small_learner(shuffled, 'ipsi')
    with pytest.raises(InputError, match='momminet_dls with shuffled'): small_learner(dls, 'ipsi_shuffled_nipples')


def test_the_training_says_whether_it_had_maps(prepared, dls):
    cases = momminet_cases(prepared.cohort)
    maps = {i: {name: torch.zeros(1, 64, 48) for name in MASS_MAPS} for i in cases.image_id}
    with_maps = small_learner(loaders(prepared, maps=maps), 'tri').model
    assert with_maps.training_info['maps'] is True
    assert small_learner(dls, 'tri').model.training_info['maps'] is False


def test_shuffled_nipples_do_not_depend_on_the_cases(prepared):
    model = SimpleNamespace(training_info=dict(nipples='shuffled', kinds=['mass']), classes=1)
    cases = momminet_cases(prepared.cohort)
    whole, part = (momminet_samples(prepared, rows, model) for rows in (cases, cases.tail(4)))
    assert all(whole[len(cases)-4+k][0]['nipple_main'].equal(part[k][0]['nipple_main']) for k in range(4))


def test_validation_changes_no_buffer_and_normals_count(learn):
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    with learn.no_bar(): learn.validate()
    assert all(value.equal(before[name]) for name, value in learn.model.state_dict().items())
    with learn.no_bar(): boxes, has_finding = learn.get_preds(ds_idx=1)
    assert 0 < has_finding.mean() < 1 # normal images are there
    assert len(boxes) == len(learn.dls.valid_ds)


def batch(*rows): return SimpleNamespace(detection_batch=SimpleNamespace(matches=rows))


def test_recall_counts_false_positives_for_every_image():
    metric = DetectionRecall(.5)
    found, missed, none = np.array([.6]), np.array([-np.inf]), np.zeros(0)
    metric.accumulate(batch((found, np.array([.9])), (none, none)))
    assert metric.value == 1 # one false positive in two images
    metric.reset()
    metric.accumulate(batch((found, np.array([.9]))))
    assert metric.value == 0 # one in one image
    assert np.isnan(DetectionRecall(.5).value)
    metric.reset()
    metric.accumulate(batch((none, none)))
    assert np.isnan(metric.value)


def test_terms_are_averaged_over_images():
    term = LossTerm('map')
    for value, n in ((1., 3), (5., 1)):
        batch = LossesFromModel()
        batch.terms, batch.n = dict(map=torch.tensor(value)), n
        term.accumulate(SimpleNamespace(cbs=[batch]))
    assert term.value == 2


def test_a_first_image_without_boxes_does_not_spoil_the_mean_of_the_loss(prepared):
    "fastai takes the batch size from the first tensor that it finds: here the boxes of the first image"
    learn = small_learner(loaders(prepared, normals=None), 'bi')
    quietly(learn)
    assert np.isfinite(learn.recorder.values[-1][0])


def test_gradients_can_be_accumulated(dls):
    quietly(small_learner(dls, 'bi', cbs=GradientAccumulation(8)))


def test_wrong_arguments_are_refused(dls):
    cases = {
        'one of': dict(variant='quad'), 'paper, small': dict(preset='tiny'),
        'only tri has parts': dict(bidual=dict()),
        'a trained BiDualNet': dict(variant='tri', ipsidual=DETECTOR, bidual=3),
        'of the loaders': dict(model=IpsiDualNet(classes=2, **DETECTOR))}
    for words, options in cases.items():
        with pytest.raises(InputError, match=words): momminet_learner(dls, **options)


def test_parts_of_another_preparation_are_refused(prepared, dls, tmp_path):
    other = prepare_cohort(prepared.cohort, tmp_path, size=(96, 72), workers=1, progress=False)
    parts = {}
    for variant, name in (('ipsi', 'ipsidual'), ('bi', 'bidual')):
        parts[name] = small_learner(loaders(other), variant).model
        given = PARTS | {name: parts[name]}
        with pytest.raises(InputError, match=rf'tri, {name}.*size') as error:
            momminet_learner(dls, 'tri', model_args=dict(width=8), **given)
        assert '64' in str(error.value) and '96' in str(error.value)
    momminet_learner(loaders(other), 'tri', model_args=dict(width=8), **parts)


def test_presets_make_models(dls):
    assert set(PRESETS['small']) == {cls for cls, _ in VARIANTS.values()}
    model = momminet_learner(dls, 'single', preset='small').model
    assert sum(p.numel() for p in model.parameters()) < 1e6


# ---- run configuration

def test_what_a_dataset_remembers_is_no_part_of_a_run(prepared):
    learn = small_learner(loaders(prepared))
    learn.create_opt()
    learn.n_epoch = 1
    before = run_config_of(learn)
    for ds in (learn.dls.train_ds, learn.dls.valid_ds): ds[0], ds[1]
    assert run_config_of(learn) == before


# ---- predictions

def test_true_boxes_are_those_of_the_cohort_also_of_a_mirrored_image(prepared, learn):
    table = predict(learn, prepared)
    truth = table[(table.output == 'finding') & has_box(table)]
    findings = prepared.cohort.findings.query("kind == 'mass'")
    assert set(truth.laterality) == {'L', 'R'}
    key = ['image_id', *BOX_COLUMNS]
    pd.testing.assert_frame_equal(
        truth[key].sort_values(key, ignore_index=True),
        findings[key].drop_duplicates().astype(dict.fromkeys(BOX_COLUMNS, float)).sort_values(key, ignore_index=True),
        check_dtype=False)


def test_a_detection_of_a_mirrored_image_lies_on_its_finding(prepared, learn):
    "Boxes of the prepared image go back to the stored one"
    dataset = momminet_samples(prepared, momminet_cases(prepared.cohort), learn.model)
    positive = [k for k in range(len(dataset)) if len(dataset[k][1]['boxes']) and dataset.rows.laterality[k] == 'R']
    k = positive[0]
    row, boxes = dataset.rows.iloc[k], dataset[k][1]['boxes'].double().numpy()
    stored = prepared.load(row.image_id).inverse_boxes(boxes)
    own = prepared.cohort.findings
    own = own[(own.image_id == row.image_id) & (own.kind == 'mass')][list(BOX_COLUMNS)].to_numpy(float)
    assert np.abs(stored-own).max() < .01


def test_a_table_from_a_file_gives_the_same_metrics(prepared, learn, tmp_path):
    table = predict(learn, prepared, split='test')
    write_predictions(table, tmp_path/'p.csv')
    same = [evaluate(t, n_boot=50).round(6) for t in (table, read_predictions(tmp_path/'p.csv'))]
    pd.testing.assert_frame_equal(*same)
    assert same[0].metric.tolist() == ['recall_0.5', 'recall_1', 'recall_2', 'mean_recall']
    assert {'ci_low', 'ci_high', 'n'} <= set(same[0])


def test_images_with_a_finding_without_place_are_not_evaluated(prepared, learn, capsys):
    findings = prepared.cohort.findings.copy()
    image_id = findings.image_id[findings.kind == 'mass'].iloc[0]
    findings.loc[findings.image_id == image_id, list(BOX_COLUMNS)] = np.nan
    vague = TinyLike(prepared, prepared.cohort.with_tables(findings=findings))
    rows = true_box_rows(momminet_samples(vague, momminet_cases(vague.cohort), learn.model), 'ipsidual', 'v')
    assert image_id not in set(rows.image_id)
    boxes = rows.assign(output='probability')
    extra = boxes.head(1).assign(image_id=image_id, value=.5)
    evaluate_detections(pd.concat([boxes, extra, rows]), n_boot=20)
    assert '1 images without known findings' in capsys.readouterr().out


def test_an_unlabelled_cohort_has_no_truth(prepared, learn):
    cohort = prepared.cohort
    unlabelled = TinyLike(prepared, cohort.with_tables(findings=cohort.findings[:0]))
    table = predict(learn, unlabelled, rows=momminet_cases(cohort).head(4))
    assert set(table.output) == {'probability'}
    with pytest.raises(InputError, match='true boxes'): evaluate(table.assign(split='test'))


class TinyLike:
    "The same images with another cohort"
    def __init__(self, prepared, cohort):
        self.__dict__.update(prepared.__dict__)
        self.cohort, self.load = cohort, prepared.load


def test_two_kinds_of_findings_are_two_outputs(prepared):
    kinds = ('mass', 'calcification')
    learn = quietly(small_learner(loaders(prepared, kinds=kinds)))
    assert class_kinds(learn.model) == [*kinds]
    table = predict(learn, prepared)
    assert set(table.output) == {'probability', 'probability_calcification', 'finding', 'finding_calcification'}
    names = evaluate(table[table.split != 'train'].assign(split=None), n_boot=20).metric.tolist()
    assert len(names) == len(set(names)) == 8


def test_missing_views_are_predicted(prepared, dls):
    rows = momminet_cases(prepared.cohort).query("split == 'test'")
    alone = rows.assign(image_id_ipsilateral=None, image_id_contralateral=None)
    for variant in ('ipsi', 'bi', 'tri'):
        model = small_learner(dls, variant).model
        table = predict(model, prepared, rows=alone)
        assert set(table.image_id[table.output == 'probability']) == set(rows.image_id)


def test_detections_are_drawn_on_the_stored_image(prepared, learn):
    import matplotlib.pyplot as plt
    table = predict(learn, prepared, split='test')
    image_id = table.image_id[(table.output == 'finding') & has_box(table)].iloc[0]
    ax = show_detections(table, prepared.cohort, image_id)
    assert ax.images[0].get_array().shape[:2] == (192, 144)
    x0, y0 = ax.patches[0].get_xy()
    truth = table[(table.image_id == image_id) & (table.output == 'finding')]
    assert [x0, y0] in truth[['xmin', 'ymin']].to_numpy().tolist()
    plt.close('all')


def test_the_three_commands_take_a_detector(prepared, tmp_path):
    options = dict(loader_options=dict(bs=8, device='cpu'), learner_options=dict(preset='small', encoder='hrnet_w18_small'))
    learn, metrics = train_system(
        'ipsidual', prepared.cohort.root, tmp_path/'model', (64, 48), epochs=1, workers=1, **options)
    assert metrics.metric.tolist()[0] == 'recall_0.5'
    table, n_images, n_left = predict_folder(prepared.cohort.root, tmp_path/'model', tmp_path/'out', workers=1)
    assert (n_images, n_left) == (48, 0)
    assert mammo_evaluate(str(tmp_path/'out'/'predictions.csv'), split='valid', n_boot=20, out=str(tmp_path/'m.csv')) == 0
    again = pd.read_csv(tmp_path/'m.csv')
    assert np.allclose(again.value, metrics.value, atol=1e-4)


# ---- loaders

def test_wrong_rows_are_refused_before_an_image_is_read():
    prepared = TinyPrepared(tiny_images(dict(A='train', B='train', C='valid', D='test')))
    rows = momminet_cases(prepared.cohort)
    wrong = rows.assign(image_id_ipsilateral=rows.image_id)
    with pytest.raises(InputError, match='image_id_ipsilateral'): momminet_dls(prepared, rows=wrong, device='cpu')
    assert prepared.loaded == []


def test_images_of_test_patients_are_not_read():
    prepared = TinyPrepared(tiny_images(dict(A='train', B='train', C='valid', D='test')))
    momminet_dls(prepared, bs=2, device='cpu')
    assert {name[0] for name in prepared.loaded} == {'A', 'B', 'C'}


# ---- stages

QUICK = dict(
    single=dict(epochs=1), ipsi=dict(epochs=1, model_args=DETECTOR), bi=dict(epochs=2, model_args=ENCODER),
    fusion=dict(epochs=1, model_args=dict(width=8)))


class StopAfter(Callback):
    "Stop as a killed process would, in the epoch of a stage"
    order = 10**7
    def __init__(self, variant, epoch=0): self.variant, self.at = variant, epoch
    def after_epoch(self):
        if self.model.training_info['variant'] == self.variant and self.epoch == self.at: raise KeyboardInterrupt


def run_stages(prepared, folder, lines=None, **options):
    say = (lambda line: None) if lines is None else lines.append
    options = dict(folds=None, settings=QUICK, bs=4, device='cpu', say=say) | options
    return train_momminet(prepared, folder, **options)


@pytest.fixture(scope='module')
def whole(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    return model_version(run_stages(prepared, folder)), folder


@pytest.mark.parametrize('variant', ['bi', 'tri'])
def test_a_stopped_training_ends_as_one_that_was_not(prepared, whole, tmp_path, variant):
    "In `bi` after the first of two epochs, when `ipsi` is whole; in `tri` after the last one"
    with pytest.raises(KeyboardInterrupt): run_stages(prepared, tmp_path, cbs=StopAfter(variant))
    torch.rand(99)
    lines = []
    again = run_stages(prepared, tmp_path, lines)
    assert model_version(again) == whole[0]
    assert 'reused' in lines[0]


def test_a_second_call_trains_nothing_and_other_settings_train_again(prepared, whole):
    version, folder = whole
    lines = []
    assert model_version(run_stages(prepared, folder, lines)) == version
    assert len(lines) == 5 and all('reused' in line for line in lines)
    lines = []
    other = QUICK | dict(fusion=dict(epochs=1, lr=1e-4, model_args=dict(width=8)))
    assert model_version(run_stages(prepared, folder, lines, settings=other)) != version
    assert [('reused' in line) for line in lines].count(True) == 4


def test_maps_come_back_as_they_were_written(tmp_path):
    maps = {'a b': dict(map_ipsidual=torch.rand(1, 4, 3).half(), map_bidual=torch.rand(1, 4, 3).half())}
    write_mass_maps(maps, tmp_path)
    again = read_mass_maps(tmp_path)
    assert again.keys() == maps.keys()
    assert all(again['a b'][name].equal(values) for name, values in maps['a b'].items())


def test_wrong_settings_of_stages_are_refused(prepared, tmp_path):
    with pytest.raises(InputError, match='ipsi, bi, fusion'): run_stages(prepared, tmp_path, settings=dict(tri={}))
    with pytest.raises(InputError, match='epochs'): run_stages(prepared, tmp_path, settings=dict(bi=dict(epochs=0)))
    other = QUICK | dict(bi=dict(epochs=1, model_args=ENCODER | dict(width=8)))
    with pytest.raises(InputError, match='the encoder of `ipsi`'): run_stages(prepared, tmp_path, settings=other)


class KeepStart(Callback):
    "Weights of each network before its training"
    def __init__(self): self.begins = {}
    def before_fit(self):
        model = self.model
        encoder = model.encoder if hasattr(model, 'encoder') else getattr(model, 'pyramid', None)
        if encoder is None: return
        variant = model.training_info['variant']
        self.begins[variant] = {k: v.clone() for k, v in encoder.state_dict().items()}


def test_both_networks_begin_with_the_detector_of_single_views(prepared, tmp_path):
    "The weights of its file, to the bit; without the stage they are others"
    keep = KeepStart()
    run_stages(prepared, tmp_path/'a', cbs=keep)
    single = load_model(next((tmp_path/'a').glob('single-*')))
    pyramid = single.pyramid.state_dict()
    assert all(keep.begins['ipsi'][k].equal(v) for k, v in pyramid.items())
    assert all(keep.begins['bi'][k].equal(v) for k, v in single.pyramid.encoder.state_dict().items())
    alone = KeepStart()
    lines = []
    run_stages(prepared, tmp_path/'b', lines, cbs=alone, settings=QUICK | dict(single=None))
    assert 'single' not in alone.begins and len(lines) == 4
    assert not all(alone.begins['ipsi'][k].equal(v) for k, v in pyramid.items())
