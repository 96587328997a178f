"""Stands for the session leader and parent that a job has on a node, and reports what becomes of the job.

argv: descriptor for the reports, 1 for a controlling terminal (descriptor 0) or 0, the command. Started in a session of
its own. Reports are lines: the job's pid, then the si_code and si_status of each change.
"""

import fcntl
import os
import signal
import sys
import termios

report, controlling, *command = sys.argv[1:]
signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
if controlling == "1":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
pid = os.fork()
if pid == 0:
    os.setpgid(0, 0)
    if controlling == "1":
        os.tcsetpgrp(0, os.getpid())
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execvp(command[0], command)
for fd in (0, 1, 2):
    os.close(fd)  # like the real ones: only the job keeps the terminal open
os.write(int(report), b"%d\n" % pid)
while True:
    result = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WCONTINUED)
    assert result is not None
    os.write(int(report), b"%d %d\n" % (result.si_code, result.si_status))
    if result.si_code not in (os.CLD_STOPPED, os.CLD_CONTINUED):
        break
