"""Functions in processes of their own, which can be killed.

They are forked from a server that has imported the libraries and run nothing, so each is as new as one that Python starts,
without the seconds that the imports take.
"""
import multiprocessing

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['pytest', 'mammo_nb.learners.mammonet', 'mammo_nb.learners.risk', 'mammo_nb.insilico.files'])


def _call(sender, function, args):
    function(sender.send, *args)


class Elsewhere:
    "`function(tell, *args)` in another process; what it tells can be read here"

    def __init__(self, function, *args):
        self.receiver, sender = SERVER.Pipe(duplex=False)
        self.process = SERVER.Process(target=_call, args=(sender, function, args))
        self.process.start()
        sender.close()

    def told(self):
        "What it tells, one by one, until it ends"
        while True:
            try:
                yield self.receiver.recv()
            except EOFError:
                return

    def kill(self):
        self.process.kill()
        self.process.join(60)
        return self.process.exitcode

    def finish(self):
        "All that it has told; it must end well"
        told = list(self.told())
        self.process.join(60)
        assert self.process.exitcode == 0
        return told
