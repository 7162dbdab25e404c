"""Speed of radiomics, as ratios measured in one run: `make bench NAME=radiomics SEED=0`.

The data are lesions of 20 to 80 pixels in images of noise and blobs, 8 bits, 512 x 384 pixels, as PNG files with a mask each:
the form of the public code. The rival is its loop, on one core: read image and mask with SimpleITK, make an
extractor of PyRadiomics with the same seven classes, and call it, file by file.

- `two processes / plain loop`: `extract_radiomics` of the table of files with two workers, into an empty cache.
- `one process / plain loop`: the same with one worker.
- `cached / plain loop`: the same files again, with all features kept, one worker.

`speed_ratio` is the rival's seconds over ours: the median of the rounds, with a bootstrap interval over rounds. In each
round the routes run in random order. Worker processes start before the clock. A round is repeated if other programs
used more than a tenth of a core, up to `--tries` times. All routes must give equal values. Every library has one
thread. The seed is that of the images, the order and the resamples.
"""
import os
for _name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS'):
    os.environ[_name] = '1'
import logging
import shutil
import sys
import tempfile
from pathlib import Path
import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import gaussian_filter
HERE = Path(__file__).resolve().parent # not on the path: this file has the name of PyRadiomics' package
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or '.').resolve() != HERE)]
from benchmarks._bench import Bench, options
from benchmarks.prepare import run_rounds, seconds_of, speed_ratio
from mammo_nb.core.monitor import usable_cores
from mammo_nb.core.optional import optional_import
from mammo_nb.core.seeding import rng_for
from mammo_nb.preparation.radiomics import RADIOMICS_NAMES
from mammo_nb.preparation.radiomics_cohort import extract_radiomics

SIZE, SPACING_MM = (512, 384), .1
CLASSES = ('shape2D', 'firstorder', 'glcm', 'glrlm', 'glszm', 'ngtdm', 'gldm')
ROUTES = ('plain', 'one', 'two', 'cached')

# The data

def draw(rng):
    "(image [H,W] uint8, mask [H,W] bool) of a lesion on textured tissue"
    y, x = np.mgrid[:SIZE[0], :SIZE[1]]
    radius = rng.uniform(10, 40)
    row, col = rng.uniform(60, SIZE[0]-60), rng.uniform(60, SIZE[1]-60)
    mask = np.hypot((y-row)*rng.uniform(.7, 1.3), x-col) < radius
    tissue = gaussian_filter(rng.standard_normal(SIZE), 4)
    image = 110 + 25*tissue/tissue.std() + 60*gaussian_filter(mask.astype(float), 2)
    image += rng.normal(0, 8, SIZE)
    return image.clip(0, 255).astype(np.uint8), mask

def write_lesions(folder, n, seed):
    "The table of files of some lesions"
    rows = []
    for i in range(n):
        image, mask = draw(rng_for(seed, 'radiomics', i))
        paths = [str(folder/f'{i}-{kind}.png') for kind in ('image', 'mask')]
        Image.fromarray(image).save(paths[0])
        Image.fromarray(mask.astype(np.uint8)).save(paths[1])
        rows.append(dict(finding_id=f'f{i}', image_path=paths[0], mask_path=paths[1], spacing_mm=SPACING_MM))
    return pd.DataFrame(rows)

# The routes

def plain_features(row):
    "102 features of a lesion, as the public code computes them"
    import SimpleITK as sitk
    from radiomics.featureextractor import RadiomicsFeatureExtractor
    image = sitk.ReadImage(row.image_path, sitk.sitkFloat64) # bins of 8 bits overflow with NumPy 2
    mask = sitk.ReadImage(row.mask_path)
    for part in (image, mask):
        part.SetSpacing((SPACING_MM, SPACING_MM))
    extractor = RadiomicsFeatureExtractor(binWidth=25)
    extractor.disableAllFeatures()
    for kind in CLASSES:
        extractor.enableFeatureClassByName(kind)
    found = extractor.execute(image, mask)
    return [float(found[name]) for name in RADIOMICS_NAMES]

def plain_loop(files):
    "[N,102]"
    return np.array([plain_features(row) for row in files.itertuples()])

def ours(files, folder, workers):
    "The table of our route"
    table = extract_radiomics(files, folder=folder, workers=workers, progress=False)
    assert len(table.lesions) == len(files)
    return table

def largest_difference(own, plain):
    "Largest relative difference of the features"
    return float(np.max(np.abs(own-plain)/np.maximum(np.abs(plain), 1e-9)))

def check_equal(files, kept):
    "Stop unless all routes give equal values; the largest relative difference"
    plain, names = plain_loop(files), list(RADIOMICS_NAMES)
    differences = []
    for folder, workers in ((None, 1), (None, 2), (kept, 1), (kept, 1)):
        table = ours(files, folder, workers)
        differences.append(largest_difference(table.lesions[names].to_numpy(), plain))
    assert table.n_cached == len(files)
    assert max(differences) < 1e-9, differences
    return max(differences)

# The run

def one_round(files, folder, kept, rng):
    "Seconds of each route, in random order"
    out = {}
    for route in rng.permutation(list(ROUTES)).tolist():
        empty = folder/'empty'
        shutil.rmtree(empty, ignore_errors=True)
        calls = dict(plain=(plain_loop, files), one=(ours, files, empty, 1),
                     two=(ours, files, empty, 2), cached=(ours, files, kept, 1))
        out[route] = [seconds_of(*calls[route])]
    return out

def add_rows(bench, files, folder, a):
    "Measure and add all rows"
    rng, kept = np.random.default_rng(a.seed), folder/'kept'
    difference = check_equal(files, kept) # starts the workers too
    t = run_rounds(lambda: one_round(files, folder, kept, rng), a.rounds, a.tries)
    for name, route in (('two processes', 'two'), ('one process', 'one'), ('cached', 'cached')):
        ratio = speed_ratio(t['plain'], t[route], rng)
        bench.add(f'{name} / plain loop', 'speed_ratio', *ratio, n=len(files))
    bench.add('extract_radiomics - plain loop', 'largest_relative_difference', difference, n=len(files))

def main(argv=None):
    a = options(__doc__, argv, seed=(0, 'of images, order and resamples'), lesions=96, rounds=7, tries=5)
    config = dict(size=SIZE, lesions=a.lesions, rounds=a.rounds)
    bench = Bench('radiomics', a.seed, config, 'about 4 minutes on 2 cores; needs a quiet machine')
    if usable_cores() < 2:
        raise SystemExit('radiomics: two processes need two cores')
    if bench.finished('extract_radiomics - plain loop', 'largest_relative_difference'):
        return
    optional_import('radiomics', 'Radiomics', 'pyradiomics-bhklab').setVerbosity(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        add_rows(bench, write_lesions(folder, a.lesions, a.seed), folder, a)

if __name__ == '__main__':
    main()
