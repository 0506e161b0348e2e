"""Read run folders, compare their accuracy and communication in tables, and draw plots.

Use `python -m bandwidth_analysis RUN [RUN ...]` in a shell, or the functions below in Python.
Nothing is written but the plots, into a folder that the caller names. sweep.py trains the runs.
"""

from bandwidth_analysis.errors import AnalysisError
from bandwidth_analysis.plot_files import write_plots
from bandwidth_analysis.runs import Run, read_run
from bandwidth_analysis.table import comparison_table

__all__ = ["AnalysisError", "Run", "comparison_table", "read_run", "write_plots"]
