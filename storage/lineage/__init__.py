"""Lineage: the records of a workspace, shown by MLflow.

MLflow is a projection. It can be deleted, moved to another server, or be out of reach for a week: `sync` makes it say
again what the records say. Importing this package does not import MLflow.

A parent run stands for each experiment record, and a child run for each stage instance, below the experiment that
computed it; elsewhere a small "(reused)" run leads there. Codecs and latent sets are logged models, image sets
datasets. Every description links to the runs that made its inputs and to those that use its outputs.

    records ──graph──► results, experiments, edges ──projection──► MLflow
                                  │ pages: Markdown   │ mirror: what is there, by our ids
                                  │ content: values   │ tracker: connection, database, files
"""

from storage.lineage.errors import LineageUnavailable
from storage.lineage.graph import LineageError
from storage.lineage.projector import Projector
from storage.lineage.server import default_tracking_uri, ui_command
from storage.lineage.syncing import RecordBodies, SyncReport, sync

__all__ = [
    "LineageError",
    "LineageUnavailable",
    "Projector",
    "RecordBodies",
    "SyncReport",
    "default_tracking_uri",
    "sync",
    "ui_command",
]
