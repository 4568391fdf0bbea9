-- Asks whether a request may be sent to a provider that may be failing for long. All times are this server's clock, in ms.
-- Asking again with the op that holds the probe keeps it.
--
-- KEYS[1] breaker  hash    outcomes (the last 20 that were told, '1' failed, '0' not, newest last), open_ms (how long it
--                          was opened last; there while it is open), until (nothing is sent before), probe (op of who
--                          may send now) and probe_until; by:TELLER of each process (what it told last, as a digit of
--                          outcomes, and when)
-- ARGV[1] op       string
-- ARGV[2] probe    ms for which a probe is given; who dies gives it back so
-- ARGV[3] longest  ms that nothing is sent at a time
-- Reply: {0, troubled (0|1: failures are among the outcomes)} closed, send | {1, wait_ms} open: ask again then
--        {2, ms} open, and this request is the probe

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + tonumber(time[2]) / 1000
local op, probe_ms, longest = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local ASK_AGAIN_MS, KEPT_MS = 1000, 3600000

local outcomes, open_ms, until_ms, probe, probe_until =
  unpack(redis.call('HMGET', KEYS[1], 'outcomes', 'open_ms', 'until', 'probe', 'probe_until'))
if not open_ms then
  return {0, outcomes and string.find(outcomes, '1', 1, true) and 1 or 0}
end

-- A clock that was set back makes nobody wait longer than anybody is told to.
local wait = math.min(tonumber(until_ms) - now, longest)
if wait > 0 then return {1, math.ceil(wait)} end

local left = probe and math.min(tonumber(probe_until) - now, probe_ms) or 0
if probe ~= op and left > 0 then return {1, math.ceil(math.min(left, ASK_AGAIN_MS))} end

-- A full server, too, takes what is written behind a first write that needs no memory.
redis.call('HDEL', KEYS[1], '')
redis.call('HSET', KEYS[1], 'probe', op, 'probe_until', string.format('%.3f', now + probe_ms))
redis.call('PEXPIRE', KEYS[1], KEPT_MS)
return {2, probe_ms}
