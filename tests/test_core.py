"Errors, vocabulary, geometry and optional imports: what a page shows badly."
import numpy as np
import pytest
from mammo_nb.core.errors import InputError, check_in, check_range
from mammo_nb.core.geometry import Affine, map_mask
from mammo_nb.core.optional import optional_import
from mammo_nb.core.vocabulary import parse_birads, parse_laterality, parse_view, split_view_key

def refused(words, function, *args, **options):
    with pytest.raises(InputError) as e:
        function(*args, **options)
    assert words in str(e.value)

# ---- errors

def test_a_word_that_is_not_allowed():
    refused("cohort: view: found 'ML', expected one of CC, MLO", check_in, 'ML', ('CC', 'MLO'), 'cohort', 'view')

@pytest.mark.parametrize('value, low, high, whole, words', [
    (-1, 0, None, False, 'demo: n: found -1, expected a number in [0, inf]'),
    (float('nan'), 0, 1, False, 'found nan'),
    ('7', 0, 1, False, "found '7'"),
    (1.5, 1, 5, True, 'n: found 1.5, expected a whole number in [1, 5]'),
    (float('inf'), 1, None, True, 'found inf, expected a whole number'),
])
def test_a_number_out_of_range(value, low, high, whole, words):
    refused(words, check_range, value, low, high, 'demo', 'n', whole=whole)

@pytest.mark.parametrize('value', [3, 3., np.int64(3), np.float32(3)])
def test_a_whole_number_of_any_type(value):
    assert check_range(value, 1, 5, 'demo', 'n', whole=True) is value

# ---- vocabulary

@pytest.mark.parametrize('function, text, words', [
    (parse_laterality, 'B', "laterality: found 'B', expected L or R, LEFT or RIGHT"),
    (parse_view, 'sideways', "found 'sideways', expected one of CC, MLO"),
    (split_view_key, 'front', 'a side and a view, like L-CC'),
    (split_view_key, 'L CC extra', 'a side and a view, like L-CC'),
    (split_view_key, '', 'a side and a view, like L-CC'),
    (parse_birads, 7, 'found 7'),
])
def test_a_word_that_is_unknown(function, text, words):
    refused(words, function, text)

@pytest.mark.parametrize('key, parts', [
    ('left mlo', ('L', 'MLO')), ('mlo right', ('R', 'MLO')), ('CC_L', ('L', 'CC')), ('RXCCL', ('R', 'XCCL')),
])
def test_spellings_of_a_view_key(key, parts):
    assert split_view_key(key) == parts

# ---- geometry

def test_a_mask_cannot_be_rotated():
    rotate = Affine(np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1.]]))
    refused('shears or rotates', map_mask, rotate, np.ones((9, 9)), (9, 9))

@pytest.mark.parametrize('matrix', [np.zeros((3, 3)), np.eye(2), np.full((3, 3), np.nan)])
def test_a_matrix_that_is_no_map(matrix):
    refused('a finite, invertible 3 x 3 matrix', Affine, matrix)

def test_a_map_cannot_be_changed():
    with pytest.raises(ValueError):
        Affine.identity().matrix[0, 0] = 2

# ---- optional imports

@pytest.mark.parametrize('options, words', [
    ({}, 'pip install no_such_library'),
    (dict(install='pyradiomics-bhklab'), 'pip install pyradiomics-bhklab'),
])
def test_a_library_that_is_not_installed(options, words):
    with pytest.raises(ImportError) as e:
        optional_import('no_such_library.part', 'Radiomics', **options)
    assert "Radiomics needs 'no_such_library.part'" in str(e.value)
    assert words in str(e.value)
