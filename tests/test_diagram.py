"""Diagrams: what is refused, and that the image of a notebook is always the same."""
import pytest
from mammo_nb.core.diagram import Diagram
from mammo_nb.core.errors import InputError


def two_boxes():
    drawing = Diagram(2, 2)
    drawing.box('a', 0, 0, 'first', kind='input')
    drawing.box('b', 1, 1, 'second', kind='output')
    return drawing


def test_a_title_that_is_too_long_is_refused():
    with pytest.raises(InputError, match="box wide: text 'a title.*inches"):
        two_boxes().box('wide', 0, 1, 'a title that is much too long')


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="kind: found 'learnt', expected one of input, learned"):
        two_boxes().box('c', 0, 1, 'third', kind='learnt')


@pytest.mark.parametrize('start, end', [('a', 'c'), ('c', 'a')])
def test_an_arrow_of_an_unknown_box_is_refused(start, end):
    with pytest.raises(InputError, match="box: found 'c', expected one of a, b"):
        two_boxes().arrow(start, end)


def test_the_image_is_always_the_same():
    images = set()
    for _ in range(2):
        drawing = two_boxes()
        drawing.arrow('a', 'b', 'label', bend=.2)
        images.add(drawing.legend()._repr_png_())
    assert len(images) == 1
