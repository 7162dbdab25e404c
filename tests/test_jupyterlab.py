"The notebooks open and run in JupyterLab: a real server on the loopback address, asked over the addresses its pages ask."
import json, os, subprocess, sys, time, urllib.error, urllib.request, uuid
from pathlib import Path
import pytest
import websocket
from repo import ROOT

TOKEN = uuid.uuid4().hex

class Lab:
    def __init__(self, folder):
        "A server with its own settings, in its own folder, on a port that it chooses"
        runtime = folder/'runtime'
        env = {**{k: v for k, v in os.environ.items() if k != 'MPLBACKEND'}, 'HOME': str(folder), 'JUPYTER_CONFIG_DIR': str(folder/'config'), 'JUPYTER_DATA_DIR': str(folder/'data'), 'JUPYTER_RUNTIME_DIR': str(runtime),
               'IPYTHONDIR': str(folder/'ipython'), 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT/".ci/offline"}', 'IN_TEST': '1', 'OMP_NUM_THREADS': '1'}
        self.log = folder/'log'
        with self.log.open('w') as out:
            self.proc = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', '--port=0', f'--IdentityProvider.token={TOKEN}',
                                          f'--ServerApp.root_dir={ROOT}', '--LabApp.news_url=None', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'],
                                         cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        self.url = self.find(runtime)

    def find(self, runtime):
        end = time.time() + 60
        while time.time() < end and self.proc.poll() is None:
            for p in runtime.glob('jpserver-*.json'):
                try: return json.loads(p.read_text())['url']
                except json.JSONDecodeError: break  # it is being written
            time.sleep(.2)
        raise RuntimeError(f'JupyterLab did not start: {self.log.read_text()[-2000:]}')

    def ask(self, path, method='GET', body=None):
        req = urllib.request.Request(self.url + path, method=method, data=None if body is None else json.dumps(body).encode(), headers={'Authorization': f'token {TOKEN}'})
        for _ in range(50):
            try:
                with urllib.request.urlopen(req, timeout=30) as r: return r.read().decode()
            except urllib.error.HTTPError: raise
            except urllib.error.URLError: time.sleep(.2)  # it wrote its address a moment before it listens
        raise RuntimeError('JupyterLab does not answer')

    def close(self):
        self.proc.terminate()
        try: self.proc.wait(15)
        except subprocess.TimeoutExpired:
            self.proc.kill()
            self.proc.wait()

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp('lab'))
    yield lab
    lab.close()

def run_cells(lab, path, cells):
    "Runs code cells in a kernel of the server, as the page does; returns what each of them sent back"
    session = json.loads(lab.ask('api/sessions', 'POST', {'path': path, 'name': Path(path).name, 'type': 'notebook', 'kernel': {'name': 'python3'}}))
    kernel = session['kernel']['id']
    ws = websocket.create_connection(lab.url.replace('http', 'ws', 1) + f'api/kernels/{kernel}/channels', header=[f'Authorization: token {TOKEN}'], timeout=120)
    results = []
    for code in cells:
        mid = uuid.uuid4().hex
        header = dict(msg_id=mid, username='', session=uuid.uuid4().hex, msg_type='execute_request', version='5.3')
        ws.send(json.dumps(dict(header=header, parent_header={}, metadata={}, channel='shell', buffers=[],
                                content=dict(code=code, silent=False, store_history=True, user_expressions={}, allow_stdin=False, stop_on_error=True))))
        got = []
        while True:
            m = json.loads(ws.recv())
            if m['parent_header'].get('msg_id') != mid or m['channel'] != 'iopub': continue
            if m['msg_type'] in ('execute_result', 'display_data', 'stream', 'error'): got.append(m)
            if m['msg_type'] == 'status' and m['content']['execution_state'] == 'idle': break
        results.append(got)
    ws.close()
    lab.ask(f'api/sessions/{session["id"]}', 'DELETE')
    return results

def test_the_page_opens(lab):
    page = lab.ask('lab/tree/nbs/core/03_geometry.ipynb')
    assert 'JupyterLab' in page and 'jupyter-config-data' in page

@pytest.mark.parametrize('path', ['nbs/index.ipynb', 'nbs/core/02_vocabulary.ipynb', 'nbs/core/03_geometry.ipynb'])
def test_a_notebook_opens_and_runs(lab, path):
    nb = json.loads(lab.ask(f'api/contents/{path}'))
    assert nb['type'] == 'notebook' and nb['format'] == 'json' and not nb.get('message')
    cells = [c for c in nb['content']['cells'] if c['cell_type'] == 'code']
    results = run_cells(lab, path, [c['source'] for c in cells])
    errors = [m['content']['evalue'] for r in results for m in r if m['msg_type'] == 'error']
    assert errors == []
    stored = [any('image/png' in o.get('data', {}) for o in c['outputs']) for c in cells]
    shown = [any('image/png' in m['content'].get('data', {}) for m in r) for r in results]
    assert shown == stored, 'the figures of this run are not in the cells in which they are stored'

def test_a_failing_cell_is_seen(lab):
    results = run_cells(lab, 'nbs/core/01_errors.ipynb', ['1 + 1', 'assert False, "broken"'])
    assert results[0][0]['content']['data']['text/plain'] == '2' and results[1][0]['content']['evalue'] == 'broken'
