"""Memory of one measurement, in a process of its own."""
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import psutil
from benchmarks._bench import GIB

class Peak:
    "Largest growth of this process inside the `with` block, as `gib`; sampled every millisecond"
    def __enter__(self):
        self.process, self.running = psutil.Process(), True
        self.before = self.most = self.process.memory_info().rss
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def look(self):
        self.most = max(self.most, self.process.memory_info().rss)

    def watch(self):
        while self.running:
            self.look()
            time.sleep(.001)

    def __exit__(self, *exc):
        self.running = False
        self.thread.join()
        self.look()
        self.gib = (self.most-self.before)/GIB

def in_new_process(function, *args):
    "Call a function in a new process"
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        return pool.submit(function, *args).result()
