/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * bpsh on several nodes: commands that start at once are one order to the cluster (procs/onexec in bpfs(5)). Their
 * processes wait, one more, the template, execs the command, and what that has become is copied to all nodes. Where
 * the cluster does not take it so, each goes by itself, as for a single node.
 */
#ifndef BPSH_BATCH_H
#define BPSH_BATCH_H

#include "bpsh.h"
#include "jobs.h"

extern struct job template_job; /* the command's first process, which only lends its looks; pid 0: there is none */

/* So many jobs are about to begin: may they wait for each other? */
int batch_wanted(const struct options *options, size_t count);

/* In a job's process: returns when it has to go by itself. */
void batch_wait(const struct job *job);

/* In the template's process: returns when it is to exec; ends it where it is of no use. */
void batch_wait_template(void);

/* The template has not become the command: all go by themselves. */
void batch_give_up(void);

/* All that wait have begun: hands in the order. */
void batch_send(const struct options *options);

/* Whether an order is still on its way: no further job can begin. */
int batch_busy(void);

/* The template has ended. */
void batch_ended(int status);

#endif
