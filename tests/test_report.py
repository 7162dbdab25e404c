"The page against hostile content, overlays against what misleads, and the sections of the tour"
import re
from html.parser import HTMLParser
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from mammo_nb.core.code_hash import code_modules
from mammo_nb.core.errors import InputError
from mammo_nb.report.blocks import figure_uri, inline_html, table_html, text_html
from mammo_nb.report.overlay import scale_limit, show_maps, signed_layer, write_overlays
from mammo_nb.report.page import Section, external_resources, page_html, write_page
from mammo_nb.report.sections import SECTIONS, find_sections, make_section, tour_section
from mammo_nb.report.tour import LEAST, Tour, TourConfig

HOSTILE = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "'; --", '<style>@import url(//x)</style>',
           '[a](javascript:alert(1))', '`<b>`', '**<i>**', '[a](https://x.y/"onmouseover="z)', '&lt;', '<!--', ']]>',
           '\u202e\u0000', '<base href="https://x">']
ALLOWED_TAGS = set('''html head meta title style body header h1 p nav ol ul li a main section h2 aside div table thead
    tbody tr th td figure img figcaption code strong footer'''.split())


class Tags(HTMLParser):
    "Tags with the names of their attributes, and the text, of a document"
    def __init__(self, document):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(document)

    def handle_starttag(self, tag, attrs): self.tags.append((tag, tuple(k for k, _ in attrs)))
    def handle_data(self, data): self.text.append(data)


# -- the page

@pytest.mark.parametrize('bad', HOSTILE)
def test_hostile_text_is_shown_and_never_run(bad):
    fig, ax = plt.subplots(figsize=(1, 1))
    ax.set_axis_off()
    section = Section(bad).text(bad).note(bad).table(pd.DataFrame({bad: [bad]}), bad).figure(fig, bad, alt=bad)
    document = page_html(bad, [section], bad, bad)
    assert external_resources(document) == []
    found = Tags(document).tags
    assert {tag for tag, _ in found} <= ALLOWED_TAGS
    assert not [name for _, names in found for name in names if name.startswith('on')]


@pytest.mark.parametrize('bad', HOSTILE)
def test_hostile_text_in_a_table_is_shown_as_it_is(bad):
    shown = ''.join(Tags(table_html(pd.DataFrame(dict(a=[bad])))).text)
    assert bad.replace('\u0000', '') in shown.replace('\u0000', '')


@pytest.mark.parametrize('text,html', [
    ('[x](https://a" onclick="b)', '[x](https://a&quot; onclick=&quot;b)'),
    ('[the paper](https://example.org/a)', '<a href="https://example.org/a">the paper</a>'),
    ('[above](#in-short)', '<a href="#in-short">above</a>')])
def test_only_safe_addresses_become_links(text, html):
    assert inline_html(text) == html


def test_only_lines_that_all_begin_with_a_hyphen_are_a_list():
    assert text_html('- one\ntwo') == '<p>- one two</p>'


@pytest.mark.parametrize('value,text', [(1., '>1<'), (2.5, '>2.500<'), (float('inf'), '>inf<'), (None, '><'), ([1, 2], '>[1, 2]<'), (True, '>True<')])
def test_values_of_a_table(value, text):
    assert text in table_html(pd.DataFrame(dict(a=[value])))


def test_every_anchor_of_the_page_exists():
    document = page_html('t', [Section(title).text('x') for title in ('A b', 'A b', '!', '?')])
    ids = re.findall(r'<section id="([^"]+)"', document)
    assert ids == re.findall(r'href="#([^"]+)"', document)
    assert len(set(ids)) == 4


@pytest.mark.parametrize('bad', [
    '<script>1</script>', '<img src=//x.y/z.png>', '<p style="background:url(https://x)">', '<style>@import "a"</style>',
    '<b onclick="f()">', '<iframe srcdoc=x>', '<link href="https://x">', '<svg><rect fill="url(https://x)"/></svg>'])
def test_what_comes_from_outside_is_found(bad):
    assert external_resources(bad)


def draw_curve(fmt):
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    ax.imshow(np.eye(3))
    return figure_uri(fig, fmt)


@pytest.mark.parametrize('fmt', ['png', 'svg'])
def test_figures_leave_no_date_and_no_open_figure(fmt):
    plt.close('all')  # those of other tests
    assert draw_curve(fmt) == draw_curve(fmt)
    assert plt.get_fignums() == []


@pytest.mark.parametrize('more,error', [('<script src="//x"></script>', InputError), ('\ud800', UnicodeEncodeError)])
def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, more, error):
    path = write_page(tmp_path/'i.html', page_html('one', [Section('a').text('b')]))
    old = path.read_text()
    with pytest.raises(error): write_page(path, old.replace('</main>', more+'</main>'))
    assert path.read_text() == old
    assert [p.name for p in tmp_path.iterdir()] == ['i.html']


# -- overlays

def test_a_layer_puts_a_cell_where_its_pixels_are():
    cells = np.zeros((6, 4))
    cells[4, 1] = 2
    layer = signed_layer(cells, np.ones((48, 32), bool))
    strength = layer[..., 3]
    row, col = np.unravel_index(strength.argmax(), strength.shape)
    assert 32 <= row < 40 and 8 <= col < 16
    weights = strength/strength.sum()
    middle = (weights.sum(1) @ np.arange(48) + .5, weights.sum(0) @ np.arange(32) + .5)
    np.testing.assert_allclose(middle, (36, 12), atol=1e-3)


def test_the_colour_of_a_layer_is_its_sign():
    values = np.array([[1., -1.]])
    red, _, blue, opacity = signed_layer(values, np.ones((1, 2), bool))[0].T
    assert red[0] > blue[0] and blue[1] > red[1]
    np.testing.assert_allclose(opacity, .75)


def prepared_view(shape=(16, 12), spacing_mm=1.):
    mask = np.zeros(shape, bool)
    mask[:, :8] = True
    return SimpleNamespace(image=np.full((1, *shape), .5), mask=mask, spacing_mm=spacing_mm)


def texts(ax): return [t.get_text() for t in ax.texts]


@pytest.mark.parametrize('values', [0., np.nan, 1e-9])
def test_an_empty_map_is_not_drawn_and_is_called_empty(values):
    view = prepared_view()
    fig = show_maps(dict(cc=view), dict(cc=np.full(view.mask.shape, values)), limit=1.)
    plain, with_map = fig.axes[:2]
    assert len(with_map.images) == len(plain.images) == 1
    assert 'no attribution' in texts(with_map)
    plt.close(fig)


def test_the_air_is_never_coloured():
    view = prepared_view()
    values = np.where(view.mask, 1., 50.)
    fig = show_maps(dict(cc=view), dict(cc=values))
    layer = fig.axes[1].images[1].get_array()
    assert not layer[~view.mask, 3].any()
    assert layer[view.mask, 3].min() > 0
    plt.close(fig)


def test_views_share_one_scale():
    views = dict(cc=prepared_view(), mlo=prepared_view())
    weak = np.full((16, 12), .1)
    fig = show_maps(views, dict(cc=10*weak, mlo=weak))
    strong, faint = (fig.axes[i].images[1].get_array()[0, 0, 3] for i in (1, 3))
    np.testing.assert_allclose(strong, 10*faint, rtol=1e-5)
    plt.close(fig)


def test_the_scale_of_no_map_is_zero():
    assert scale_limit({}, {}) == 0


def test_a_system_without_overlays_is_refused():
    with pytest.raises(InputError, match='two_view, mammonet'): write_overlays(SimpleNamespace(system='lmvnet'), None, None, 'x')


# -- sections and choices of the tour

def test_an_error_names_its_section():
    def fill(tour, section): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError) as caught: make_section(None, 'bad', fill)
    assert caught.value.__notes__ == ["in the section 'bad' of the tour"]


def test_a_section_defined_twice_stands_once():
    before = len(find_sections())
    for title in ('one', 'two'):
        @tour_section(1, title)
        def again(tour, section): section.text('x')
    assert len(find_sections()) == before + 1
    assert find_sections()[0][1] == 'two'
    SECTIONS.pop(f'{again.__module__}.again')


def test_the_sections_of_the_library():
    assert [order for order, _, _ in find_sections()] == [10, 20, 30, 40, 50, 60, 70, 80, 83, 84, 84.5, 84.7, 85, 90, 100]


@pytest.mark.parametrize('name', LEAST)
def test_too_small_a_tour_is_refused(name):
    with pytest.raises(InputError, match=f'{name}: found {LEAST[name]-1}'): TourConfig(**{name: LEAST[name]-1})


def test_patients_of_the_tour_depend_on_how_they_are_drawn_and_written(monkeypatch, tmp_path):
    hashed = []
    monkeypatch.setattr('mammo_nb.report.tour.code_hash', lambda *modules: hashed.extend(modules) or 'code')
    tour = Tour(tmp_path, TourConfig(n_patients=12), tell=lambda line: None, progress=False)
    with pytest.raises(ZeroDivisionError): tour.insilico_stage('some', 12, lambda folder: 1/0)
    used = code_modules(*hashed)
    assert {f'mammo_nb.insilico.{name}' for name in ('patients', 'images', 'exposure', 'tables', 'files')} <= set(used)
