// Computes with parallel streams, locks, timed waits and much garbage until args[0] appears or args[1] steps are done; prints the
// steps and a digest.

import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.util.Arrays;
import java.util.HexFormat;
import java.util.concurrent.ConcurrentHashMap;
import java.util.stream.IntStream;

class Steps {
    static long part(int index, long seed) {
        var seen = new ConcurrentHashMap<Long, String>();
        for (int i = 0; i < 300; i++) {
            seed = seed * 6364136223846793005L + index + 1442695040888963407L;
            seen.put(seed >>> 40, Long.toHexString(seed));
        }
        for (var entry : seen.entrySet()) // in any order
            seed += entry.getKey() ^ entry.getValue().length();
        return seed;
    }

    public static void main(String[] args) throws Exception {
        var stop = Path.of(args[0]);
        long limit = args.length > 1 ? Long.parseLong(args[1]) : 0, steps = 0, ticks[] = {0};
        var timer = new Thread(() -> {
            synchronized (ticks) {
                try {
                    for (;; ticks[0]++)
                        ticks.wait(1);
                } catch (InterruptedException end) {
                    Thread.currentThread().interrupt();
                }
            }
        });
        timer.start();
        var state = new long[8];
        while (limit > 0 ? steps < limit : !Files.exists(stop)) {
            long now = steps++;
            var next = new long[state.length];
            IntStream.range(0, state.length).parallel().forEach(i -> next[i] = part(i, state[i] + now));
            System.arraycopy(next, 0, state, 0, state.length);
            Thread.sleep(2); // or its garbage would keep a busy machine busy
            if (steps == 3)
                Files.createFile(Path.of(args[0] + ".ready"));
        }
        timer.interrupt();
        timer.join();
        var digest = MessageDigest.getInstance("SHA-256").digest(Arrays.toString(state).getBytes(StandardCharsets.UTF_8));
        System.out.println(steps + " " + HexFormat.of().formatHex(digest) + " " + (ticks[0] > 0));
    }
}
