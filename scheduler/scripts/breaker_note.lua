-- Tells how requests ended. Opens the breaker when at least half of the last 20 outcomes failed, or 5 in a row.
-- Told twice, since a reply was lost, a failure counts twice; what the probe says counts once.
--
-- KEYS[1] breaker  as in breaker_pass.lua
-- ARGV[1] op       of the probe, '' for any other request
-- ARGV[2] outcome  'good' | 'failed' | 'unclear' (says nothing of the provider; for a probe only)
-- ARGV[3] before   requests of this process that went well and were not told, before this one
-- ARGV[4] first    ms that nothing is sent at first
-- ARGV[5] longest  ms, at most; doubled so far by probes that fail
-- Reply: {0, 0} closed | {1, wait_ms} open

local LAST, SHARE, IN_A_ROW, KEPT_MS = 20, 10, 5, 3600000

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + tonumber(time[2]) / 1000
local op, outcome, before = ARGV[1], ARGV[2], tonumber(ARGV[3])
local first, longest = tonumber(ARGV[4]), tonumber(ARGV[5])

-- A full server, too, takes what is written behind a first write that needs no memory.
redis.call('HDEL', KEYS[1], '')

local function open_for(wait)
  redis.call('HDEL', KEYS[1], 'probe', 'probe_until')
  redis.call('HSET', KEYS[1], 'open_ms', wait, 'until', string.format('%.3f', now + wait))
  redis.call('PEXPIRE', KEYS[1], KEPT_MS)
  return {1, wait}
end

local outcomes, open_ms, until_ms, probe =
  unpack(redis.call('HMGET', KEYS[1], 'outcomes', 'open_ms', 'until', 'probe'))

if open_ms then
  -- What was sent before it opened says nothing new.
  if op == '' or op ~= probe then
    return {1, math.max(0, math.ceil(math.min(tonumber(until_ms) - now, longest)))}
  end
  if outcome == 'good' then
    redis.call('DEL', KEYS[1])
    return {0, 0}
  end
  if outcome == 'failed' then return open_for(math.min(longest, 2 * tonumber(open_ms))) end
  redis.call('HDEL', KEYS[1], 'probe', 'probe_until')
  return {1, 0}
end

if outcome == 'unclear' then return {0, 0} end
outcomes = (outcomes or '') .. string.rep('0', math.min(before, LAST)) .. (outcome == 'failed' and '1' or '0')
outcomes = string.sub(outcomes, -LAST)
local _, failed = string.gsub(outcomes, '1', '')
if string.sub(outcomes, -IN_A_ROW) == string.rep('1', IN_A_ROW) or (#outcomes == LAST and failed >= SHARE) then
  redis.call('HDEL', KEYS[1], 'outcomes')
  return open_for(first)
end
redis.call('HSET', KEYS[1], 'outcomes', outcomes)
redis.call('PEXPIRE', KEYS[1], KEPT_MS)
return {0, 0}
