"""The paper's Tables 1 and 2 and Fig. 3: sweeps of runs, and tables of their results with the paper's numbers."""
