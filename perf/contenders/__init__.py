"""Who is measured: the `flow` command and its peers, each with what it does and does not do."""

from __future__ import annotations

from perf.contenders.base import Contender
from perf.contenders.baseline import PythonCopy
from perf.contenders.flow import Flow, FlowLocal
from perf.contenders.grid import GridFtp, XRootD
from perf.contenders.parts import Parts
from perf.contenders.plain import Casync, Copy, Iperf, TarSocat
from perf.contenders.ssh import (
    Rclone,
    RsyncDaemon,
    RsyncDaemonFsync,
    RsyncDaemonZ,
    RsyncSsh,
    RsyncSshFsync,
    RsyncSshZ,
    Scp,
)

__all__ = ["CONTENDERS", "Contender"]

CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (
        Flow,
        FlowLocal,
        RsyncSsh,
        RsyncSshZ,
        RsyncSshFsync,
        RsyncDaemon,
        RsyncDaemonZ,
        RsyncDaemonFsync,
        Rclone,
        GridFtp,
        XRootD,
        Casync,
        Scp,
        TarSocat,
        Copy,
        PythonCopy,
        Parts,
        Iperf,
    )
}
