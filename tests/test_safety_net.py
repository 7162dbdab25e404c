"""What the library computes is what it was, digit by digit on the processor of the reference, and to 1e-4 on others: see `safety_net.py`."""
import math
import warnings

import pytest
from safety_net import PART, differences, made_with, read_reference, report, same, compute

REFERENCE, MADE_WITH = read_reference()


@pytest.mark.parametrize('part', list(PART))
def test_nothing_has_changed(part):
    "All entries of a part that differ, in one message"
    if made_with() != MADE_WITH:
        pytest.skip('the reference is of other library versions or of another kind of processor')
    entries = compute(part)
    lines = differences(REFERENCE, entries, [part], elsewhere=True)
    assert not lines, report(lines, MADE_WITH)
    last_digits = differences(REFERENCE, entries, [part])
    if last_digits:
        warnings.warn(f'{len(last_digits)} entries differ in their last digits: another processor than that of the reference?')


def test_every_entry_belongs_to_a_part():
    assert {key.split('/')[0] for key in REFERENCE} == set(PART)


def test_every_digit_counts():
    old = dict(a=[1., math.nan, 'x'], b=2., c=3, d='gone')
    new = dict(a=[1., math.nan, 'x'], b=math.nextafter(2., 3.), c=3, e=1.)
    old, new = ({f'metrics/{k}': v for k, v in o.items()} for o in (old, new))
    lines = differences(old, new, ['metrics'])
    assert [line.split(':')[0] for line in lines] == ['metrics/b', 'metrics/d', 'metrics/e']


def test_a_tolerance_is_relative():
    assert same([1e9, 'x'], [1e9+1, 'x'], 1e-6) and not same(1e-9, 2e-9, 1e-6)
    assert not same([1.], [1., 1.], 1.) and not same(math.nan, 1., 1.)


def test_another_processor_changes_last_digits_only():
    old = {'metrics/a': [1e6, 2., math.nan], 'metrics/sha256': 'x', 'metrics/b': 1.}
    noise = {'metrics/a': [1e6, 2.5, math.nan], 'metrics/sha256': 'y', 'metrics/b': 1.00005}
    assert not differences(old, noise, ['metrics'], elsewhere=True)
    change = {'metrics/a': [1e6, 2002., math.nan], 'metrics/sha256': 'x', 'metrics/b': 1.01}
    assert len(differences(old, change, ['metrics'], elsewhere=True)) == 2
