"""In-silico cohorts that are drawn and prepared once, trainings that are done once, jobs on all cores.

All that is kept lies below `.cache/`, so a stopped run continues. The name of what is kept contains
a hash of its recipe and one of the code that made it.
"""
import inspect
import time
import pandas as pd
import torch
from joblib import Parallel, delayed
from benchmarks._bench import ROOT, tag
from mammo_nb.core.code_hash import code_hash
from mammo_nb.core.files import atomic_path
from mammo_nb.core.monitor import usable_cores
from mammo_nb.insilico.files import write_insilico
from mammo_nb.preparation.prepare import PrepareConfig
from mammo_nb.preparation.prepared_cohort import prepare_cohort

CACHE = ROOT/'.cache'

# Data

def prepare_insilico(
    cohort, # of `insilico_cohort`, or a selection from it
    label, # tells cohorts of the same settings apart
    size # (rows, columns) of the prepared images
): # the prepared cohort, and the folder for all that is made from it
    "Write and prepare in-silico patients, once"
    settings = cohort.images.provenance.iloc[0].replace(' ', '_')
    code = code_hash('mammo_nb.insilico.files')[:12]
    folder = CACHE/'insilico'/f'{settings}_{label}_{code}'
    written = write_insilico(cohort, folder/'files')
    return prepare_cohort(written, folder/'prepared', PrepareConfig(size=size)), folder

# What is kept

def recipe_folder(
    base, # of the cohort, from `prepare_insilico`
    name, # of the benchmark or training
    recipe, # settings
    functions, # functions and classes whose source is part of the recipe
    modules # of the library, hashed with all that they import
): # a path
    "Name the folder of results of a recipe"
    sources = [inspect.getsource(f) for f in functions]
    return base/f'{name}_{tag(recipe, sources)}_{code_hash(*modules)[:12]}'

def save_tensors(tensors, path):
    "Write tensors, whole or not at all"
    with atomic_path(path) as part:
        torch.save(tensors, part)

def load_tensors(path):
    "Read tensors to the CPU"
    return torch.load(path, map_location='cpu', weights_only=True)

def weights_or_train(
    path, # of the weights
    model, # new, of the same architecture
    train # `train(model)` -> trained model
): # the trained model, in evaluation mode
    "Load the weights of a training, or train and keep them"
    if path.exists():
        model.load_state_dict(load_tensors(path))
    else:
        model = train(model)
        save_tensors(model.state_dict(), path)
    return model.eval()

def tables_or_train(
    folder, # of the recipe
    name, # of the training
    parts, # names of its tables
    train # `train()` -> a table for each part
): # list of tables
    "Load the tables of a training, or train and keep them"
    paths = [folder/f'{name}_{part}.parquet' for part in parts]
    if all(path.exists() for path in paths):
        return [pd.read_parquet(path) for path in paths]
    start = time.time()
    tables = train()
    for path, table in zip(paths, tables, strict=True):
        with atomic_path(path) as part:
            table.to_parquet(part)
    print(f'  {name}: trained and tested in {time.time()-start:.0f} s', flush=True)
    return list(tables)

# Jobs

def _on_one_thread(function, *args):
    torch.set_num_threads(1)
    return function(*args)

def run_jobs(
    jobs # tuples: a function and its arguments
): # the results, in order
    "Run jobs on all cores with one thread each, which is faster than many threads a training"
    work = (delayed(_on_one_thread)(*job) for job in jobs)
    return Parallel(n_jobs=usable_cores())(work)
