-- Tells how requests ended. Opens the breaker when at least half of the last 20 outcomes failed, or 5 in a row, unless as
-- many processes are well as fail: then it is theirs and not the provider's. Told twice, since a reply was lost, a failure counts twice; what the probe says counts once.
--
-- KEYS[1] breaker  as in breaker_pass.lua
-- ARGV[1] op       of the probe, '' for any other request
-- ARGV[2] outcome  'good' | 'failed' | 'unclear' (says nothing of the provider; for a probe only)
-- ARGV[3] before   requests of this process that went well and were not told, before this one
-- ARGV[4] first    ms that nothing is sent at first
-- ARGV[5] longest  ms, at most; doubled so far by probes that fail
-- ARGV[6] teller   of the process
-- Reply: {0, 0} closed | {1, wait_ms} open

local LAST, SHARE, IN_A_ROW, KEPT_MS = 20, 10, 5, 3600000
-- Half as long again as who is at work and well goes without telling.
local LATELY_MS = 7500

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + tonumber(time[2]) / 1000
local op, outcome, before = ARGV[1], ARGV[2], tonumber(ARGV[3])
local first, longest, teller = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]

-- A full server, too, takes what is written behind a first write that needs no memory.
redis.call('HDEL', KEYS[1], '')

local function open_for(wait)
  redis.call('HDEL', KEYS[1], 'probe', 'probe_until')
  redis.call('HSET', KEYS[1], 'open_ms', wait, 'until', string.format('%.3f', now + wait))
  redis.call('PEXPIRE', KEYS[1], KEPT_MS)
  return {1, wait}
end

-- Whether more processes failed than went well, as each of them told last; who told nothing of late has no say.
local function most_fail()
  local failing, well = 0, 0
  local fields = redis.call('HGETALL', KEYS[1])
  for i = 1, #fields, 2 do
    if string.sub(fields[i], 1, 3) == 'by:' then
      local said, at = string.sub(fields[i + 1], 1, 1), tonumber(string.sub(fields[i + 1], 2))
      if math.abs(now - at) > LATELY_MS then
        redis.call('HDEL', KEYS[1], fields[i])
      elseif said == '1' then
        failing = failing + 1
      else
        well = well + 1
      end
    end
  end
  return failing > well
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
local said = outcome == 'failed' and '1' or '0'
redis.call('HSET', KEYS[1], 'by:' .. teller, said .. string.format('%.3f', now))
outcomes = string.sub((outcomes or '') .. string.rep('0', math.min(before, LAST)) .. said, -LAST)
local _, failed = string.gsub(outcomes, '1', '')
local many = string.sub(outcomes, -IN_A_ROW) == string.rep('1', IN_A_ROW) or (#outcomes == LAST and failed >= SHARE)
-- Counted each time, which also forgets who is gone.
if most_fail() and many then
  redis.call('HDEL', KEYS[1], 'outcomes')
  return open_for(first)
end
redis.call('HSET', KEYS[1], 'outcomes', outcomes)
redis.call('PEXPIRE', KEYS[1], KEPT_MS)
return {0, 0}
