"""A campaign of faults: training runs are killed, starved and damaged, and must end as if nothing had happened.

python -m tests.campaign --faults 1000 --seed 0

kinds            the table of faults, and what may follow each
configurations   the runs that they are injected into
moments          when a fault strikes
inside           what is changed in the process of a run: its clock, its file operations, its gradients
commands         a training command, the processes that it started, and signals to them
references       undisturbed runs, and the comparison with them
trials           one run with several faults, and what must hold after each
campaign         many trials at once, and their table
"""
