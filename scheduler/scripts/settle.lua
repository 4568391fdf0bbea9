-- Settles one grant: gives its permit back, corrects the estimate, and reacts to a refusal for rate.
-- A grant that is settled already, or was taken back, changes nothing.
--
-- KEYS    as in reserve.lua: state, holders, grants, window
-- ARGV[1] op              string
-- ARGV[2] outcome         'used' (actual tokens count) | 'unknown' (the estimate counts) | 'unsent' (nothing counts)
--                         | 'limited' (refused for its rate: the request counts, its tokens do not)
-- ARGV[3] actual          tokens, for 'used'
-- ARGV[4] limit           for 'limited': 'requests' | 'tokens' | 'concurrency' | 'address' | 'unknown'
-- ARGV[5] announced       for 'limited': the limit's value as the provider told it, 0 = not told
-- ARGV[6] retry_after     for 'limited': ms, -1 = not told
-- ARGV[7] configured      for 'limited': our own value of that limit, 0 = none
-- ARGV[8] window          ms
-- Reply: {settled (0|1), gate_ms (the key is closed for so long)}

local CUT, LEAST_FACTOR, RECOVERY_PER_WINDOW, BELIEVED_MS = 0.85, 0.1, 0.09, 3600000
local CAP_CUT_EVERY_MS, LONGEST_GATE_MS = 1000, 60000

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + tonumber(time[2]) / 1000
local op, outcome = ARGV[1], ARGV[2]
local window = tonumber(ARGV[8])

local state = {}
local flat = redis.call('HGETALL', KEYS[1])
for i = 1, #flat, 2 do state[flat[i]] = tonumber(flat[i + 1]) end

local function ms(value) return string.format('%.3f', value) end
local function gate_left() return math.max(0, math.ceil((state.gate or 0) - now)) end
local function put(name, value)
  state[name] = value
  redis.call('HSET', KEYS[1], name, string.format('%.6f', value))
end

local grant = redis.call('HGET', KEYS[3], op)
if not grant then return {0, gate_left()} end
redis.call('HDEL', KEYS[3], op)
redis.call('ZREM', KEYS[2], op)

local _, estimate, request_cost, token_cost, bucket = string.match(grant, '(%S+) (%S+) (%S+) (%S+) (%S+)')
estimate = tonumber(estimate)
local actual = outcome == 'used' and tonumber(ARGV[3]) or outcome == 'unknown' and estimate or 0
local requests = outcome == 'unsent' and 0 or 1

put('tat_tokens', (state.tat_tokens or 0) - tonumber(token_cost) * (estimate - actual) / estimate)
put('tat_requests', (state.tat_requests or 0) - tonumber(request_cost) * (1 - requests))
local counted = redis.call('HGET', KEYS[4], bucket)
if counted then
  local r, t = string.match(counted, '(%S+) (%S+)')
  redis.call('HSET', KEYS[4], bucket,
    string.format('%.0f %.0f', math.max(0, tonumber(r) + requests - 1), math.max(0, tonumber(t) + actual - estimate)))
end

if outcome == 'used' and actual > 0 and (state.refusals or 0) > 0 and now >= (state.gate or 0) then put('refusals', 0) end
if outcome ~= 'limited' then return {1, gate_left()} end

local limit, announced, configured = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[7])
local believed = configured
if state[limit] and now - (state[limit .. '_at'] or 0) < BELIEVED_MS and (believed == 0 or state[limit] < believed) then
  believed = state[limit]
end
local news = announced > 0 and (believed == 0 or announced < believed)
if announced > 0 and limit ~= 'address' and limit ~= 'unknown' then
  put(limit, announced)
  put(limit .. '_at', now)
end

if limit == 'concurrency' then
  local cap = news and announced or believed
  if state.cap then
    local grown = state.cap + math.floor((now - state.cap_at) / window)
    cap = cap > 0 and math.min(cap, grown) or grown
  end
  -- The refusals of one moment are one lesson.
  if news then
    put('cap', cap)
  elseif now - (state.cap_at or 0) > CAP_CUT_EVERY_MS then
    put('cap', math.max(1, (cap > 0 and cap or redis.call('ZCARD', KEYS[2]) + 1) - 1))
  end
  put('cap_at', now)
elseif not news and now - (state.factor_cut_at or 0) > window / 12 then
  local factor = math.min(1, (state.factor or 1) + RECOVERY_PER_WINDOW * (now - (state.factor_at or now)) / window)
  put('factor', math.max(LEAST_FACTOR, factor * CUT))
  put('factor_at', now)
  put('factor_cut_at', now)
end

local retry_after = tonumber(ARGV[6])
if retry_after >= 0 then
  put('gate', math.max(state.gate or 0, now + math.min(retry_after, LONGEST_GATE_MS)))
elseif now >= (state.gate or 0) then
  local base, longest = window / 30, window
  if limit == 'concurrency' then base, longest = window / 240, window / 12 end
  if limit == 'address' then base, longest = 5000, LONGEST_GATE_MS end
  put('gate', now + math.min(longest, base * 2 ^ math.min(10, state.refusals or 0)))
  put('refusals', (state.refusals or 0) + 1)
end
return {1, gate_left()}
