"""Where the rollouts of a run are carried out. One contract, several executors.

An executor's `execute` runs a job until it is done; however it ends, results are handed in, claims
are given back and rollouts are over. It raises what `Worker.serve` raises.
"""
