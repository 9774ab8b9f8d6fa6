__version__ = "0.1.0"
import os, sys
os.environ.setdefault("OMP_WAIT_POLICY", "passive") # before torch loads: idle threads sleep, see the chapter device

def main():
    "Entry point of the command `pgolf`; Ctrl-C while modules load ends in a line as well."
    try:
        from pgolf.cli import main
        main()
    except KeyboardInterrupt: sys.exit("pgolf: interrupted before any work; the same command starts again") # code 1
