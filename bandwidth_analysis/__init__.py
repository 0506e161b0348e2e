"""What a run cost and what it reached: reads run folders, prints a table, draws plots.

`python -m bandwidth_analysis RUN [RUN ...]` from a shell, or the functions below from Python.
Run folders are only read, but for the plots folder named by the caller.
"""

from bandwidth_analysis.plot_files import write_plots
from bandwidth_analysis.runs import AnalysisError, Run, read_run
from bandwidth_analysis.table import comparison_table

__all__ = ["AnalysisError", "Run", "comparison_table", "read_run", "write_plots"]
