"A sixth system, as a user would write it: the mean grey level of CC predicts cancer."
import torch
from fastai.learner import Learner
from torch import nn
from mammo_nb.core.hub import HubModel
from mammo_nb.learners.outputs import SelectOutput
from mammo_nb.learners.resume import ResumeTraining
from mammo_nb.learners.systems import System, register
from mammo_nb.learners.two_view import (
    TwoViewLoss, breast_cases, evaluate_probabilities, two_view_outputs
)
from mammo_nb.samples.augment import Augment
from mammo_nb.samples.dataset import SampleDataset
from mammo_nb.samples.loaders import describe_training, sample_dls
from mammo_nb.samples.sample import Field, Sample
from mammo_nb.samples.two_view import labelled_rows


class GreyInputs(Sample):
    image = Field('image', grid='cc', label='CC')


class GreyTargets(Sample):
    label = Field('number')


class GreyDataset(SampleDataset):
    input_type, target_type = GreyInputs, GreyTargets

    def __init__(self, prepared, rows):
        super().__init__(prepared, rows, ['image_id_cc'])

    def __getitem__(self, i):
        label = torch.tensor(float(self.rows.label[i]))
        return GreyInputs(image=self.images[self.ids[i, 0]]), GreyTargets(label=label)


class GreyModel(HubModel):
    system = 'grey'

    def __init__(self, width: int = 4):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, x):
        return dict(logit=self.layers(x['image'].mean((1, 2, 3))[:, None])[:, 0])


def grey_dls(prepared, bs=8, seed=None, device=None):
    tables = [labelled_rows(prepared, split) for split in ('train', 'valid')]
    dls = sample_dls([GreyDataset(prepared, t) for t in tables], bs, Augment(), seed, device)
    dls.description = describe_training(prepared, tables[0], tables[0].label)
    return dls


def grey_learner(dls, seed=None, folder=None, **kwargs):
    model = GreyModel()
    model.set_training_info(dls.description)
    cbs = [SelectOutput()] + ([ResumeTraining(folder, dict(system='grey', seed=seed))] if folder else [])
    return Learner(dls, model, TwoViewLoss(), cbs=cbs, **kwargs)


GREY = register(System('grey', 'cancer by the mean grey level of CC', GreyModel, breast_cases, lambda p, rows, model, **kw: GreyDataset(p, rows),
                       two_view_outputs, grey_dls, grey_learner, evaluate_probabilities, 'probability'))
