__version__ = "0.1.0"
import os, signal, sys

# Before torch loads: threads that have nothing to do sleep, so that a busy machine costs its share and not everything.
# Whoever has set the variable keeps what was set.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

def _stop(*_):
    os.write(2, b"pgolf: interrupted while loading, before any work; the same command starts again\n")
    os._exit(130)

def loading():
    "Until `ready`, Ctrl-C ends the command with a line, not somewhere inside an import."
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler: signal.signal(signal.SIGINT, _stop)

def ready():
    "From here on Ctrl-C is an exception again."
    if signal.getsignal(signal.SIGINT) is _stop: signal.signal(signal.SIGINT, signal.default_int_handler)

def main():
    "Entry point of the command `pgolf`."
    loading()
    from pgolf.cli import main
    main()

if sys.argv[:1] == ["-m"] and "pgolf.cli" in sys.orig_argv: loading() # python -m pgolf.cli
