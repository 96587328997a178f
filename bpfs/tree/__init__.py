# SPDX-License-Identifier: GPL-2.0-or-later
"""The file tree /bpfs: tables of entries, a tree made of them, and the mount. The only importer of pyfuse3."""
