-- Settles grants: gives their permits back, corrects the estimates, and reacts to refusals for rate.
-- A grant that is settled already, or was taken back, changes nothing.
-- include: pace
--
-- KEYS    as in reserve.lua: state, holders, grants, window
-- ARGV[1] window          ms
-- ARGV[2], [3], [4]       requests, tokens, concurrency as configured, 0 = none
-- then of each grant six:
--   op                    string
--   outcome               'used' (actual tokens count) | 'unknown' (the estimate counts) | 'unsent' (nothing counts)
--                         | 'limited' (refused for its rate: the request counts, its tokens do not)
--   actual                tokens, for 'used'
--   limit                 for 'limited': 'requests' | 'tokens' | 'concurrency' | 'address' | 'unknown'
--   named                 for 'limited': the limit's value as the provider told it, 0 = not told
--   retry_after           for 'limited': ms, -1 = not told
-- Reply: {gate_ms (the key is closed for so long), limit, named, ...}: the limits that are news to everybody

local CUT, LEAST_FACTOR, CAP_CUT_EVERY_MS, LONGEST_GATE_MS = 0.85, 0.1, 1000, 60000

local window = tonumber(ARGV[1])
local configured = {requests = tonumber(ARGV[2]), tokens = tonumber(ARGV[3]), concurrency = tonumber(ARGV[4])}
local state, changed, told = read_state(KEYS[1]), {}, {}

local function put(name, value)
  state[name] = value
  changed[name] = value
end

local function learn(limit, named, retry_after)
  -- Of an address, or of nothing that we know: there is no limit here that could be lowered to it.
  if not configured[limit] then named = 0 end
  local believed = configured[limit] and limit_of(state, limit, configured[limit]) or 0
  local news = named > 0 and (believed == 0 or named < believed)
  if named > 0 then
    local stale = now - (state[limit .. '_at'] or 0) >= BELIEVED_MS
    if named ~= configured[limit] and (stale or state[limit] ~= named) then
      told[#told + 1] = limit
      told[#told + 1] = named
    end
    put(limit, named)
    put(limit .. '_at', now)
  end

  if limit == 'concurrency' then
    local cap = permits_of(state, news and named or believed, window)
    -- The refusals of one moment are one lesson.
    if news then
      put('cap', cap)
    elseif now - (state.cap_at or 0) > CAP_CUT_EVERY_MS then
      put('cap', math.max(1, (cap > 0 and cap or redis.call('ZCARD', KEYS[2]) + 1) - 1))
    end
    put('cap_at', now)
  elseif not news and now - (state.factor_cut_at or 0) > window / 12 then
    put('factor', math.max(LEAST_FACTOR, factor_of(state, window) * CUT))
    put('factor_at', now)
    put('factor_cut_at', now)
  end

  if retry_after >= 0 then
    put('gate', math.max(state.gate or 0, now + math.min(retry_after, LONGEST_GATE_MS)))
  elseif now >= (state.gate or 0) then
    local base, longest = window / 30, window
    if limit == 'concurrency' then base, longest = window / 240, window / 12 end
    if limit == 'address' then base, longest = 5000, LONGEST_GATE_MS end
    put('gate', now + math.min(longest, base * 2 ^ math.min(10, state.refusals or 0)))
    put('refusals', (state.refusals or 0) + 1)
  end
end

local function settle(op, outcome, actual, limit, named, retry_after)
  local grant = redis.call('HGET', KEYS[3], op)
  if not grant then return end
  redis.call('HDEL', KEYS[3], op)
  redis.call('ZREM', KEYS[2], op)

  local words = {}
  for word in string.gmatch(grant, '%S+') do words[#words + 1] = word end
  local estimate, request_cost, token_cost, bucket = tonumber(words[2]), tonumber(words[3]), tonumber(words[4]), words[5]
  local bulk_cost = tonumber(words[7] or 0)
  actual = outcome == 'used' and actual or outcome == 'unknown' and estimate or 0
  local requests = outcome == 'unsent' and 0 or 1
  local unused = (estimate - actual) / estimate

  put('tat_tokens', (state.tat_tokens or 0) - token_cost * unused)
  put('tat_requests', (state.tat_requests or 0) - request_cost * (1 - requests))
  if words[6] == 'live' then put('live', math.max(0, (state.live or 0) - 1)) end
  if bulk_cost > 0 and (requests == 0 or token_cost > request_cost) then
    put('tat_bulk', (state.tat_bulk or 0) - bulk_cost * unused)
  end
  local counted = redis.call('HGET', KEYS[4], bucket)
  if counted then
    local r, t = string.match(counted, '(%S+) (%S+)')
    redis.call('HSET', KEYS[4], bucket,
      string.format('%.0f %.0f', math.max(0, tonumber(r) + requests - 1), math.max(0, tonumber(t) + actual - estimate)))
  end

  if outcome == 'used' and actual > 0 and (state.refusals or 0) > 0 and now >= (state.gate or 0) then put('refusals', 0) end
  if outcome == 'limited' then learn(limit, named, retry_after) end
end

for i = 5, #ARGV, 6 do
  settle(ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3], tonumber(ARGV[i + 4]), tonumber(ARGV[i + 5]))
end

if next(changed) ~= nil then
  local fields = {}
  for name, value in pairs(changed) do
    fields[#fields + 1] = name
    fields[#fields + 1] = string.format('%.6f', value)
  end
  redis.call('HSET', KEYS[1], unpack(fields))
end
return {whole((state.gate or 0) - now), unpack(told)}
