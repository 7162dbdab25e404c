"Says whether this Python can run mammo_nb; any Python can run this file."
import sys
if sys.version_info < (3, 11):
    sys.exit('mammo_nb needs Python 3.11 or newer, this is %s (%s). Use another one: make PYTHON=/path/to/python3.11' % (sys.version.split()[0], sys.executable))
try: import ensurepip, venv
except ImportError: sys.exit('This Python cannot make environments (on Debian and Ubuntu: apt-get install python3-venv)')
