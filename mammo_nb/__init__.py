"Multi-view, longitudinal mammography. `import mammo_nb as mn` gives the names of `mammo_nb.core.face`, each imported when it is first used."
__version__ = "0.1.0"

from .core.face import face_names, load_face

def __getattr__(name):
    if name.startswith('_'): raise AttributeError(f"module 'mammo_nb' has no attribute {name!r}")
    value = globals()[name] = load_face(name)
    return value

def __dir__(): return sorted([*face_names(), '__version__'])
