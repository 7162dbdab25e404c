"No network in tests: with this folder on PYTHONPATH, every Python process refuses to look up or call any machine but its own."
import ipaddress, socket

class NoNetwork(OSError): "A notebook or a test asked for another machine"

def _local(host):
    if host in (None, '', b'', 'localhost', b'localhost', socket.gethostname()): return True
    host = host.decode() if isinstance(host, bytes) else str(host)
    try: return ipaddress.ip_address(host.split('%')[0]).is_loopback or host in ('0.0.0.0', '::')
    except ValueError: return False

def _guarded(call):
    def guarded(self, address, *args):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _local(address[0]): raise NoNetwork(f'no network in tests: {address[0]}')
        return call(self, address, *args)
    return guarded

def _lookup(call):
    def guarded(host, *args, **kwargs):
        if not _local(host): raise NoNetwork(f'no network in tests: {host}')
        return call(host, *args, **kwargs)
    return guarded

socket.socket.connect, socket.socket.connect_ex = _guarded(socket.socket.connect), _guarded(socket.socket.connect_ex)
socket.getaddrinfo = _lookup(socket.getaddrinfo)
