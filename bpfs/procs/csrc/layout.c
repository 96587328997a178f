/* layout - prints sizes, offsets and numbers of mux.h, one "name value" a line, for the test that compares them. */
#include "mux.h"

#include <stdio.h>

#define SHOW(x) printf("%s %d\n", #x, (int)(x))

int main(void)
{
	printf("ctl.head %zu\nctl.value %zu\nctl %zu\n", CTL_HEAD, offsetof(struct ctl, value), sizeof(struct ctl));
	printf("birth %zu\n", sizeof(struct birth));
	printf("chan_record %zu\nframe %zu\n", sizeof(struct chan_record), sizeof(struct frame));
	SHOW(C_NAME); SHOW(C_STREAM); SHOW(C_HOLD); SHOW(C_RESUME); SHOW(C_EXIT); SHOW(C_KILLED); SHOW(C_STOP);
	SHOW(C_CONT); SHOW(C_PUMP); SHOW(C_FORK); SHOW(C_REAP); SHOW(C_IDS); SHOW(C_ARGUMENTS); SHOW(C_KEEP); SHOW(C_SEND); SHOW(C_ADOPT); SHOW(C_SEEN); SHOW(C_READY); SHOW(C_SIGNAL); SHOW(C_HELD); SHOW(C_STOPPED); SHOW(C_CONTINUED);
	SHOW(C_STREAM_LOST); SHOW(C_PUMPED); SHOW(C_BORN); SHOW(C_CHILD); SHOW(C_ADOPTED); SHOW(C_INTERRUPTED); SHOW(C_CHILD_STOPPED); SHOW(C_STRIKE); SHOW(C_STRUCK); SHOW(C_ATTACH); SHOW(C_DETACH); SHOW(C_ENDED); SHOW(C_LOST); SHOW(C_FRONT); SHOW(C_FRONTED); SHOW(C_LIST); SHOW(C_HAS); SHOW(C_LISTED);
	SHOW(K_TTY); SHOW(K_PIPE); SHOW(K_SOCKET); SHOW(K_FILE); SHOW(MAX_CHANS); SHOW(MAX_FDS);
	return 0;
}
