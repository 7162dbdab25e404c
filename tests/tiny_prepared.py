"""A prepared cohort of tiny images in memory. The grey level of an image tells which one it is."""
from types import SimpleNamespace

import numpy as np
import pandas as pd

from mammo_nb.cohort.cohort import Cohort
from mammo_nb.preparation.prepare import PrepareConfig

SIZE = (32, 24)


def tiny_images(patients, exams=2):
    "An images table: `patients` maps a patient to a split, or to one split for each exam"
    rows = []
    for number, (patient, split) in enumerate(patients.items()):
        splits = split if isinstance(split, tuple) else (split,)*exams
        for exam in range(len(splits)):
            date = pd.Timestamp(2012, 1, 1) + pd.Timedelta(days=30*number + 700*exam)
            name = f'{patient}{"abcdef"[exam]}'
            shared = dict(patient_id=patient, exam_id=name, exam_date=date, split=splits[exam])
            for side in 'LR':
                years = 2.5-1.9*exam if side == 'L' else np.nan # the left breast is ill
                for view in ('CC', 'MLO'):
                    rows.append(dict(
                        image_id=f'{name}-{side}-{view}', laterality=side, view=view,
                        path=f'{name}-{side}-{view}.png', years_followed=8.-2*exam,
                        years_to_cancer=years) | shared)
    return pd.DataFrame(rows)


def tiny_findings(images):
    "A mass on every image: a malignant one in a left breast, a benign one in a right one"
    boxes = dict(xmin=4., ymin=6., xmax=12., ymax=16.)
    pathology = images.laterality.map(dict(L='malignant', R='benign'))
    rows = [dict(finding_id=f'{i}-1', image_id=i, kind='mass', pathology=p, **boxes)
            for i, p in zip(images.image_id, pathology)]
    return pd.DataFrame(rows)


class TinyImage(SimpleNamespace):
    "A prepared image whose pixels are those of the stored one"
    @property
    def mask(self): return self.image[0] > 0

    def boxes(self, boxes, clip=True): return np.asarray(boxes, float)
    def points(self, points): return np.asarray(points, float)
    inverse_boxes, inverse_points = boxes, points


class TinyPrepared:
    "Images without files; `loaded` lists the ids in the order in which they were read"
    def __init__(self, images, failed=()):
        cohort = images if isinstance(images, Cohort) else Cohort(images, tiny_findings(images))
        if len(failed): cohort = cohort.select(~cohort.images.image_id.isin(failed).to_numpy())
        self.cohort = cohort
        self.config = PrepareConfig(size=SIZE)
        self.failures = pd.DataFrame(dict(image_id=[*failed]), dtype='str')
        self.loaded = []
        ids = cohort.images.image_id
        self.keys = {i: i for i in ids}
        self.levels = {i: np.float32((k+1)/(len(ids)+1)) for k, i in enumerate(ids)}

    def load(self, image_id):
        assert image_id in self.keys
        self.loaded.append(image_id)
        image = np.full((1, *SIZE), self.levels[image_id])
        return TinyImage(image=image, spacing_mm=1., scale=1., stored_shape=SIZE)

    def ids_in(self, sample):
        "The ids of all images that the tensors of a sample hold"
        by_level = {level: i for i, level in self.levels.items()}
        found = set()
        for name in ('patch', 'image', 'masked_image'): # a part of an image, resampled, with zeros around it and in its hole
            if name not in sample or sample[name].shape[-2:] == SIZE: continue
            brightest = float(sample[name].max())
            if brightest == 0: continue # a window without tissue, or all hole
            level = min(by_level, key=lambda known: abs(known-brightest))
            assert abs(level-brightest) < 1e-4
            found.add(by_level[level])
        for tensor in sample.values():
            if tensor.ndim < 2 or tensor.shape[-2:] != SIZE or not tensor.is_floating_point(): continue
            for image in tensor.reshape(-1, *SIZE).numpy():
                level = image[0, 0]
                assert (image == level).all()
                if level: found.add(by_level[level])
        return found
