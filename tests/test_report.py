"The page against hostile content, and stages that are killed, damaged or run twice at once"
import html, os, random, re, signal, subprocess, sys, time
from html.parser import HTMLParser
from pathlib import Path
import numpy as np, pandas as pd, pytest
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from mammo_nb.core.errors import InputError
from mammo_nb.report.page import Section, external_resources, figure_uri, page_html, table_html, text_html, write_page
from mammo_nb.report.overlay import enlarge, evidence_rgba
from mammo_nb.report.stages import Stages, code_hash, code_modules

HOSTILE = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "'; --", '<style>@import url(//x)</style>', '[a](javascript:alert(1))', '`<b>`', '**<i>**',
           '[a](https://x.y/"onmouseover="z)', '&lt;', '<!--', ']]>', '\u202e\u0000', '<base href="https://x">']

class Tags(HTMLParser):
    def __init__(self, doc): super().__init__(); self.tags, self.text = [], []; self.feed(doc)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, tuple(k for k, _ in attrs)))
    def handle_data(self, data): self.text.append(data)

@pytest.mark.parametrize('bad', HOSTILE)
def test_hostile_text_is_shown_and_never_run(bad):
    fig, ax = plt.subplots(figsize=(1, 1)); ax.set_axis_off()
    s = Section(bad).text(bad).note(bad).table(pd.DataFrame({bad: [bad]}), bad).figure(fig, bad, alt=bad)
    doc = page_html(bad, [s], bad, bad)
    assert external_resources(doc) == []
    tags = {t for t, _ in Tags(doc).tags}
    assert tags <= set('html head meta title style body header h1 p nav ol ul li a main section h2 aside div table thead tbody tr th td figure img figcaption code strong footer'.split())
    assert not [a for t, attrs in Tags(doc).tags for a in attrs if a.startswith('on')]
    assert bad.replace('\u0000', '') in ''.join(Tags(table_html(pd.DataFrame(dict(a=[bad])))).text).replace('\u0000', '')

def test_every_anchor_of_the_page_exists():
    doc = page_html('t', [Section('A b').text('x'), Section('A b').text('y'), Section('!').text('z'), Section('?').text('z')])
    ids, links = re.findall(r'<section id="([^"]+)"', doc), re.findall(r'href="#([^"]+)"', doc)
    assert len(ids) == 4 == len(set(ids)) and ids == links

def test_figures_leave_no_date_and_no_open_figure():
    def uri(fmt):
        fig, ax = plt.subplots(); ax.plot([1, 2]); ax.imshow(np.eye(3))
        return figure_uri(fig, fmt)
    for fmt in ('png', 'svg'): assert uri(fmt) == uri(fmt)
    assert plt.get_fignums() == []

def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    p = write_page(tmp_path/'i.html', page_html('one', [Section('a').text('b')]))
    old = p.read_text()
    with pytest.raises(InputError, match='nothing from outside'): write_page(p, old.replace('</main>', '<script src="//x"></script></main>'))
    with pytest.raises(UnicodeEncodeError): write_page(p, old.replace('</main>', '\ud800</main>'))
    assert p.read_text() == old and [o.name for o in tmp_path.iterdir()] == ['i.html']

def test_an_overlay_puts_a_cell_where_its_pixels_are():
    m = np.zeros((6, 4)); m[4, 1] = 2
    big = enlarge(m, (48, 32))
    r, c = np.unravel_index(big.argmax(), big.shape)
    assert 32 <= r < 40 and 8 <= c < 16  # rows 4*8.., columns 1*8..
    com = (big*np.arange(48)[:, None]).sum()/big.sum()+.5, (big*np.arange(32)).sum()/big.sum()+.5
    np.testing.assert_allclose(com, (36, 12), atol=1e-4)  # the middle of the cell
    rgba = evidence_rgba(-m, (48, 32))
    assert rgba[r, c, 2] > rgba[r, c, 0] and 0 < rgba[..., 3].max() <= .65

# -- stages

WORK = '''
import sys, time
from pathlib import Path
from mammo_nb.report.stages import Stages
def make(folder):
    for i in range(20):
        (folder/f'{i}.txt').write_text(str(i)*1000); time.sleep(.02)
with Stages(sys.argv[1]) as s: print('begun', flush=True); print(s.run('work', dict(a=1), make), flush=True)
'''

def _start(folder):
    return subprocess.Popen([sys.executable, '-c', WORK, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def _content(folder): return {p.name: p.read_text() for p in folder.rglob('*.txt')}

@pytest.mark.skipif(os.name == 'nt', reason='no SIGKILL on Windows')
def test_a_killed_stage_is_made_again_whole(tmp_path):
    r, clean = random.Random(0), {f'{i}.txt': str(i)*1000 for i in range(20)}
    for _ in range(4):
        p = _start(tmp_path)
        assert p.stdout.readline() == 'begun\n'
        time.sleep(r.uniform(0, .35)); p.send_signal(signal.SIGKILL); p.wait(); p.communicate()
        for d in tmp_path.glob('work-*'): assert _content(d) == clean  # a result is there whole, or not at all
    p = _start(tmp_path); out, err = p.communicate(timeout=60)
    assert p.returncode == 0, err
    assert _content(Path(out.splitlines()[-1])) == clean

def test_two_processes_do_not_work_in_one_folder(tmp_path):
    with Stages(tmp_path, lambda s: None):
        p = _start(tmp_path); _, err = p.communicate(timeout=60)
        assert p.returncode != 0 and 'one run at a time' in err
    p = _start(tmp_path); _, err = p.communicate(timeout=60)
    assert p.returncode == 0, err

def test_a_damaged_result_is_never_reused(tmp_path):
    made = []
    def make(d): made.append(1); (d/'a.bin').write_bytes(bytes(1000)); (d/'b').mkdir(); (d/'b/c.bin').write_bytes(b'c')
    run = lambda: Stages(tmp_path, lambda s: None).run('x', dict(k=[1, 2.5, 'ü', None]), make)
    p = run(); run(); assert len(made) == 1
    for n, harm in enumerate((lambda: (p/'a.bin').write_bytes(bytes(999)+b'\1'), lambda: (p/'b/c.bin').unlink(), lambda: (p/'stage.json').unlink(),
                              lambda: (p/'stage.json').write_text('{}'), lambda: (p/'stage.json').write_text('[]'), lambda: (p/'more').touch()), 2):
        harm(); run(); assert len(made) == n, n
    run(); assert len(made) == 7

def test_the_key_reaches_the_end():
    assert code_hash('mammo_nb.report.stages') != code_hash('mammo_nb.report.page')
    mods = code_modules('mammo_nb.data.insilico')
    assert {'mammo_nb.data.insilico', 'mammo_nb.data.dicom_file', 'mammo_nb.core.geometry', 'mammo_nb.core.errors'} <= set(mods)
    assert not any(m.startswith(('mammo_nb.metrics', 'mammo_nb.report')) for m in mods)
